"""Words that were replaced, missed or added."""

from collections.abc import Sequence

import jiwer

from flax_projector.training.scores import ScoredTranscript

Difference = tuple[str, str, str]
"""One of jiwer's "equal", "substitute", "delete" and "insert"; what was said; what was heard."""


def differences(transcripts: Sequence[ScoredTranscript]) -> list[list[Difference]]:
    """How each hypothesis differs from its reference, in what is compared of them.

    Args:
      transcripts: of one set. If it is judged by characters, these are told apart, and no words.
    """
    wrong = [t for t in transcripts if t.edits.errors and not t.is_empty]
    found = dict(zip((t.id for t in wrong), _align(wrong), strict=True))
    return [found.get(t.id, _whole(t)) for t in transcripts]


def _whole(transcript: ScoredTranscript) -> list[Difference]:
    """A transcript without errors, or one that is in no rate."""
    said, heard = transcript.normalized_reference, transcript.normalized_hypothesis
    return [("equal" if said == heard else "insert", said, heard)]


def _align(transcripts: Sequence[ScoredTranscript]) -> list[list[Difference]]:
    if not transcripts:
        return []
    said = [t.normalized_reference for t in transcripts]
    heard = [t.normalized_hypothesis for t in transcripts]
    if transcripts[0].headline == "wer":
        output, space = jiwer.process_words(said, heard), " "
    else:  # spaces say nothing in such a language
        said, heard = ([text.replace(" ", "") for text in texts] for texts in (said, heard))
        output, space = jiwer.process_characters(said, heard), ""
    aligned = zip(output.references, output.hypotheses, output.alignments, strict=True)
    return [
        [
            (
                chunk.type,
                space.join(reference[chunk.ref_start_idx : chunk.ref_end_idx]),
                space.join(hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]),
            )
            for chunk in chunks
        ]
        for reference, hypothesis, chunks in aligned
    ]
