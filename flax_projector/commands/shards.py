"""Makes tar shards, and manifests of them."""

from dataclasses import dataclass
from typing import Annotated

import tyro
from tyro.conf import Positional


@dataclass(frozen=True, kw_only=True)
class Index:
    """Makes a manifest of WebDataset tars (key.flac beside key.txt or key.json); copies nothing.

    What is wrong in them is left out, and listed in MANIFEST.bad.jsonl.
    """

    shards: Positional[
        Annotated[
            tuple[str, ...],
            tyro.conf.arg(metavar="SHARD ...", help_behavior_hint="(at least one)"),
        ]
    ]
    """Tars, as paths or URLs, or patterns of them. Those at URLs are read once."""
    out: Annotated[str, tyro.conf.arg(metavar="MANIFEST.jsonl")]
    """The manifest. If the shards lie below its folder, both can be moved together."""
    text_key: str = "text"
    """Where a key.json, or a line of --texts, has the transcript."""
    texts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE ...")] = ()
    """Files of transcripts, if these are not in the shards: the manifests of NeMo's tarred data
    sets, or the cuts of Lhotse's shar."""
    overwrite: bool = False
    """Replace the manifest if it exists."""

    def __call__(self) -> None:
        """Writes the manifest."""
        from flax_projector.data.shards.index import write_index

        if not self.shards:
            raise ValueError("name at least one shard")
        write_index(
            self.shards,
            self.out,
            text_key=self.text_key,
            texts=self.texts,
            overwrite=self.overwrite,
        )


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Writes the clips of a source in tar shards, and DST/manifest.jsonl, which training reads.

    The same command continues one that was killed, and ends with the same bytes. Rows that cannot
    be used are left out, and listed in DST/manifest.bad.jsonl.
    """

    source: Positional[Annotated[str, tyro.conf.arg(metavar="SOURCE")]]
    """A .jsonl or .tsv manifest, or hf:NAME:SPLIT."""
    dst: Positional[Annotated[str, tyro.conf.arg(metavar="DST")]]
    """A new folder, on a disk or in a bucket."""
    shard_mb: int = 256
    """About how large a shard is to be, in millions of bytes."""
    flac: bool = False
    """Write what training reads, 16 kHz mono as 16-bit FLAC, and cut segments. If not given, the
    encoded clips are copied as they are."""
    hf_streaming: bool = False
    """Stream the data set, as --data.hf-streaming does."""
    hf_max_rows: int = 0
    """Take only so many rows of the data set; 0 takes all."""

    def __call__(self) -> None:
        """Writes the shards."""
        import jax

        from flax_projector.config import DataConfig
        from flax_projector.data.shards.pack import pack

        jax.config.update("jax_platforms", "cpu")  # accelerators are not needed, and may be in use
        config = DataConfig(hf_streaming=self.hf_streaming, hf_max_rows=self.hf_max_rows)
        pack(self.source, self.dst, shard_mb=self.shard_mb, flac=self.flac, config=config)
