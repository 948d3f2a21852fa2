"""Folders of Parquet files that load by themselves: rows of `REFER_FEATURES` with their images, and a README with counts (ours)."""

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import yaml
from accelerate.utils import tqdm
from datasets.table import embed_table_storage

from training.configuration import Orientation
from training.examples.batches import open_as_annotated
from training.sources.images import upright_for
from training.sources.refer import REFER_FEATURES
from training.support.files import partial_folder, replace_folder, sha256_of, write_text

SHARD_BYTES = 500_000_000  # of distinct images in a shard

# Parquet's dictionary stores a value that comes again as a number. An image stands in each of its rows, which are adjacent:
# written once for each of these many rows, it is stored once. A reader holds as many rows at a time.
ROWS_PER_GROUP = 256
DICTIONARY_BYTES = 1 << 30


def new_output(output: str | PathLike[str]) -> Path:
    """The path of a folder to make; `FileExistsError` where something stands there already."""
    output = Path(output).expanduser().absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} is there already; remove it, or name another output.")
    return output


def write_prepared(
    splits: Mapping[str, datasets.Dataset],
    output: Path,
    name: str,
    notes: Sequence[str],
    *,
    shard_bytes: int = SHARD_BYTES,
    also: Callable[[Path], None] | None = None,
) -> None:
    """Write `data/<split>-NNNNN-of-NNNNN.parquet` and a README.md. The folder appears whole or not at all.

    Args:
        splits: Rows of REFER_FEATURES, sorted by `image_id`, whose images are paths. The files are embedded as they are, and all
            rows of an image are in one shard.
        output: Folder to make.
        name: Title of the README.
        notes: Sentences for the README.
        shard_bytes: Bytes of distinct images after which a new shard begins.
        also: Writes further files into the folder that is given to it.
    """
    partial = partial_folder(output)
    try:
        (partial / "data").mkdir()
        for split, rows in splits.items():
            shards = _cut_shards(rows, shard_bytes)
            for number, shard in enumerate(tqdm(shards, desc=f"writing {split}", leave=False)):
                file = f"{split}-{number:05d}-of-{len(shards):05d}.parquet"
                _write_shard(rows.select(shard), partial / "data" / file)
        if also is not None:
            also(partial)
        write_text(partial / "README.md", _describe(splits, partial, name, notes))
        replace_folder(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_split_name(split: str, name: str) -> None:
    """`ValueError` where the split of a set has a name that is none for a file."""
    if not re.fullmatch(r"\w+", split):
        raise ValueError(f"the split {split!r} of {name} has a name other than letters and digits.")


def check_images(splits: Mapping[str, datasets.Dataset], orientation: Orientation) -> dict[str, int]:
    """Decode every image once, in threads: a `ValueError` now, not in the middle of a training.

    Returns the images that have an orientation tag other than 1, with their tags.
    """
    sizes, upright = {}, upright_for(orientation)
    for rows in splits.values():
        for image, mask in zip(rows["image"], rows["mask"], strict=True):
            sizes[image["path"]] = tuple(mask["size"])

    def check(path: str) -> tuple[str | None, int]:
        row = {"image": {"path": path, "bytes": None}, "mask": {"size": sizes[path]}, "upright": upright}
        try:
            return None, open_as_annotated(row)[1]
        except ValueError as error:
            return str(error), 1

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(tqdm(pool.map(check, sizes), total=len(sizes), desc="checking images", leave=False))
    problems = [problem for problem, _ in results if problem is not None]
    if problems:
        raise ValueError(f"{len(problems)} images cannot be used; the first: {problems[0]}")
    return {path: tag for path, (_, tag) in zip(sizes, results, strict=True) if tag != 1}


def describe_turned(turned: Mapping[str, int], orientation: Orientation) -> str:
    """How many images have an orientation tag, and how their masks are understood."""
    meanings = {
        "upright": "their masks are taken as drawn on the upright image",
        "stored": "their masks are taken as drawn on the pixels as stored",
        "by_source": "masks of images with one of COCO's file names are taken as drawn on the pixels as stored, all others as "
        "drawn on the upright image",
    }
    path, tag = next(iter(turned.items()))
    first = f"the first is {Path(path).name}, with {tag}"
    said = f"{len(turned)} images have an orientation tag other than 1 ({first}): {meanings[orientation]}."
    return said if orientation == "by_source" else f"{said} Train with --data.orientation {orientation}."


def _cut_shards(rows: datasets.Dataset, shard_bytes: int) -> list[range]:
    """Row ranges of so many bytes of distinct images each, or just above; none begins within an image."""
    starts, held, previous = [0], 0, None
    for row, (image_id, image) in enumerate(zip(rows["image_id"], rows["image"], strict=True)):
        if image_id != previous:
            if held >= shard_bytes:
                starts.append(row)
                held = 0
            held += os.path.getsize(image["path"])
            previous = image_id
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(rows)], strict=True)]


def _write_shard(rows: datasets.Dataset, path: Path) -> None:
    """One Parquet file; no more than one of its row groups is in memory at a time."""
    writer = pq.ParquetWriter(
        path,
        REFER_FEATURES.arrow_schema,
        use_dictionary=["image.bytes"],
        dictionary_pagesize_limit=DICTIONARY_BYTES,
        write_statistics=["image_id"],  # of images they would hold the smallest and the largest
    )
    with writer:
        tables = rows.with_format("arrow")
        for start in range(0, len(rows), ROWS_PER_GROUP):
            table = tables[start : start + ROWS_PER_GROUP]
            writer.write_table(embed_table_storage(table), row_group_size=ROWS_PER_GROUP)


def _describe(splits: Mapping[str, datasets.Dataset], folder: Path, name: str, notes: Sequence[str]) -> str:
    """The README: a dataset card that names the splits, the counts, what is worth a note, and checksums for `sha256sum -c`."""
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
    card = {
        "pretty_name": name,
        "task_categories": ["image-segmentation"],
        "configs": [{"config_name": "default", "data_files": files}],
    }
    lines = ["| split | refs | sentences | images | no-target refs |", "|---|---|---|---|---|"]
    for split, rows in splits.items():
        sentences, images, empty = sum(map(len, rows["sentences"])), len(set(rows["image_id"])), sum(rows["no_target"])
        lines.append(f"| {split} | {len(rows)} | {sentences} | {images} | {empty} |")
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(card, sort_keys=False)}---\n",
            f"# {name}\n",
            "One row per referred object: its image as the original file, its mask as a COCO run-length code, its sentences and",
            "boxes; sorted by `image_id`. A row with `no_target` has a mask without a pixel.\n",
            *lines,
            f"\n{' '.join(notes)}\n",
            "SHA-256 of the shards; `grep -E '^[0-9a-f]{64}  ' README.md | sha256sum -c` checks them:\n",
            "```",
            *_checksums(sorted((folder / "data").iterdir())),
            "```\n",
        ]
    )


def _checksums(paths: Sequence[Path]) -> list[str]:
    """Lines as `sha256sum` writes them, the paths from the folder above."""
    return [f"{sha256_of(path)}  {path.parent.name}/{path.name}" for path in paths]


__all__ = ["SHARD_BYTES", "check_images", "check_split_name", "describe_turned", "new_output", "write_prepared"]
