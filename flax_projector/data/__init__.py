"""From a manifest row to this host's part of a batch.

  sound        sound files, with their real lengths; containers: those that only FFmpeg reads
  audio        audio files -> 16 kHz mono, and what can be wrong with them; stream: long ones
  shards       tars of clips: indexed, and packed from any source
  manifest     manifests -> rows; manifest_text: how they are written
  drafts       rows as they are written, and those that occur twice
  rows         rows in columns; row_file: how they are checked and written; kept: and found again
  labels       the labels of their transcripts, which are kept with them
  utterances   the rows of a set that fit the run; shared_arrays: how workers share their columns
  hf_data      Hugging Face data sets -> rows; hf_source: how they are opened; hf_clips: their clips
  hf_stream    streamed ones, whose rows are kept on disk
  bad_rows     the rows that cannot be used: listed and counted; too many are an error
  batch_plan   which utterances share a batch, and its static lengths
  inputs       where a batch's audio comes from: audio files
  frames       ... or encoder frames that were computed earlier
  shared_folder  what process 0 hands to the others through a folder that all see
  batches      the batches of a set, by number
  reader       reads them ahead, in threads or processes
  sources      from the names of sources to batches

Imports `config`, `lengths`, `files`, `logs`, `run_folder`, `batch`, `prompt` and `sharding`; never
`models`, `training` or `convert`.
"""
