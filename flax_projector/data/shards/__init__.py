"""Speech in shards: tars of clips with their transcripts, in WebDataset's layout.

  tar      what is in a shard, and writing one
  texts    transcripts that are not in the shards, as NeMo and Lhotse keep them
  index    a manifest of shards that exist
  pack     shards, and their manifest, from any source
  output   files that are written completely or not at all, and processes to write them

Training reads shards through their manifest, whose rows point into them (`audio.Slice`).
"""
