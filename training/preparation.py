"""Turn a REFER dataset into one folder that loads by itself, images and masks included.

`python training/preparation.py REFER_ROOT --dataset refcoco --split_by unc --output prepared/refcoco`; then
`datasets.load_dataset("prepared/refcoco")` gives rows of `training.sources.refer.REFER_FEATURES`, and so does `--data.source
folder`.
"""

import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import yaml
from accelerate.utils import tqdm
from datasets.table import embed_table_storage
from jsonargparse import ArgumentParser

from training.configuration import Orientation
from training.examples.batches import open_as_annotated
from training.sources.published_counts import PUBLISHED_REFS
from training.sources.refer import REFER_FEATURES, load_refer
from training.sources.row_checks import count_doubtful
from training.support.commands import run_command
from training.support.files import partial_folder, replace_folder, sha256_of, write_text

logger = logging.getLogger(__name__)

SHARD_BYTES = 500_000_000  # of distinct images in a shard

# Parquet's dictionary stores a value that comes again as a number. An image stands in each of its rows, which are adjacent:
# written once for each of these many rows, it is stored once. A reader holds as many rows at a time.
ROWS_PER_GROUP = 256
DICTIONARY_BYTES = 1 << 30


def prepare_refer(
    root: str | PathLike[str],
    output: str | PathLike[str],
    dataset: str = "refcoco",
    split_by: str = "unc",
    image_dir: str | PathLike[str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    orientation: Orientation = "by_source",
) -> None:
    """Write every split of a REFER dataset to `output`: `data/<split>-NNNNN-of-NNNNN.parquet` and a README.md.

    Rows are those of [`load_refer`] sorted by `image_id`, with the images' files embedded as they are; all rows
    of an image are in one shard. The README holds the counts, whether they are the published ones, how many images have an
    orientation tag, how many masks are doubtful, and the shards' checksums. The folder appears whole or not at all.

    Args:
        root: REFER folder.
        output: Folder to make.
        dataset: Name of the REFER set below `root`.
        split_by: Whose split.
        image_dir: Folder of the images, where they do not lie under `root`.
        shard_bytes: Bytes of distinct images after which a new shard begins.
        orientation: Which pixels masks are drawn on, as `data.orientation` has it; images are embedded as they are.

    Raises:
        FileExistsError: Where something stands at `output` already.
        FileNotFoundError, ValueError, pickle.UnpicklingError: As `load_refer`; also for a split whose name is none for a file, and
            for images that are damaged or of another size than their annotations'. All before anything is written.
    """
    output = Path(output).expanduser().absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} is there already; remove it, or name another output.")
    splits = load_refer(root, dataset, split_by, image_dir=image_dir)
    for split in splits:
        if not re.fullmatch(r"\w+", split):
            raise ValueError(f"the split {split!r} of {dataset} ({split_by}) has a name other than letters and digits.")
    splits = datasets.DatasetDict(
        {split: rows.select(np.argsort(rows["image_id"], kind="stable")) for split, rows in splits.items()}
    )
    turned = _check_images(splits, orientation)
    doubtful = sum(map(count_doubtful, splits.values()))
    if turned:
        logger.warning("%s.", _describe_turned(turned, orientation))
    verdict = compare_with_published({split: len(rows) for split, rows in splits.items()}, dataset, split_by)
    if verdict:
        logger.warning("%s (%s) is not as published: %s.", dataset, split_by, verdict)

    notes = [_describe_turned(turned, orientation) + "."] if turned else []
    if doubtful:
        notes.append(f"{doubtful} masks agree only roughly with their boxes.")
    partial = partial_folder(output)
    try:
        (partial / "data").mkdir()
        for split, rows in splits.items():
            shards = _cut_shards(rows, shard_bytes)
            for number, shard in enumerate(tqdm(shards, desc=f"writing {split}", leave=False)):
                name = f"{split}-{number:05d}-of-{len(shards):05d}.parquet"
                _write_shard(rows.select(shard), partial / "data" / name)
        write_text(partial / "README.md", _describe(splits, partial, dataset, split_by, verdict, notes))
        replace_folder(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def compare_with_published(refs: Mapping[str, int], dataset: str, split_by: str) -> str:
    """What differs from the published number of refs per split, in words; "" where nothing does or none is published."""
    published = PUBLISHED_REFS.get((dataset, split_by), {})
    names = [*published, *(split for split in refs if published and split not in published)]
    differences = [
        f"{split} has {refs.get(split, 0)} refs, published are {published.get(split, 0)}"
        for split in names
        if refs.get(split, 0) != published.get(split, 0)
    ]
    return "; ".join(differences)


def _check_images(splits: Mapping[str, datasets.Dataset], orientation: Orientation) -> dict[str, int]:
    """Decode every image once, in threads: a `ValueError` now, not in the middle of a training.

    Returns the images that have an orientation tag other than 1, with their tags.
    """
    sizes = {}
    for rows in splits.values():
        for image, mask in zip(rows["image"], rows["mask"], strict=True):
            sizes[image["path"]] = tuple(mask["size"])

    def check(path: str) -> tuple[str | None, int]:
        row = {"image": {"path": path, "bytes": None}, "mask": {"size": sizes[path]}}
        if orientation != "by_source":
            row["upright"] = orientation == "upright"
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


def _describe_turned(turned: Mapping[str, int], orientation: Orientation) -> str:
    """How many images have an orientation tag, and how their masks are understood."""
    meanings = {
        "upright": "their masks are taken as drawn on the upright image",
        "stored": "their masks are taken as drawn on the pixels as stored",
        "by_source": "masks of images with one of COCO's file names are taken as drawn on the pixels as stored, all others as "
        "drawn on the upright image",
    }
    path, tag = next(iter(turned.items()))
    first = f"the first is {Path(path).name}, with {tag}"
    return f"{len(turned)} images have an orientation tag other than 1 ({first}): {meanings[orientation]}"


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


def _describe(
    splits: datasets.DatasetDict, folder: Path, dataset: str, split_by: str, verdict: str, notes: Sequence[str]
) -> str:
    """The README: a dataset card that names the splits, the counts, how they compare, and checksums for `sha256sum -c`."""
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
    card = {
        "pretty_name": f"{dataset} ({split_by})",
        "task_categories": ["image-segmentation"],
        "configs": [{"config_name": "default", "data_files": files}],
    }
    lines = ["| split | refs | sentences | images | no-target refs |", "|---|---|---|---|---|"]
    for split, rows in splits.items():
        sentences, images, empty = sum(map(len, rows["sentences"])), len(set(rows["image_id"])), sum(rows["no_target"])
        lines.append(f"| {split} | {len(rows)} | {sentences} | {images} | {empty} |")
    if (dataset, split_by) not in PUBLISHED_REFS:
        comparison = "There are no published counts to compare with."
    elif verdict:
        comparison = f"**The counts are not the published ones**: {verdict}."
    else:
        comparison = "The numbers of refs are the published ones."
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(card, sort_keys=False)}---\n",
            f"# {dataset} ({split_by})\n",
            "One row per referred object: its image as the original file, its mask as a COCO run-length code, its sentences and",
            "boxes; sorted by `image_id`. A row with `no_target` has a mask without a pixel.\n",
            *lines,
            f"\n{' '.join([comparison, *notes])}\n",
            "SHA-256 of the shards; `grep -E '^[0-9a-f]{64}  ' README.md | sha256sum -c` checks them:\n",
            "```",
            *_checksums(sorted((folder / "data").iterdir())),
            "```\n",
        ]
    )


def _checksums(paths: Sequence[Path]) -> list[str]:
    """Lines as `sha256sum` writes them, the paths from the folder above."""
    return [f"{sha256_of(path)}  {path.parent.name}/{path.name}" for path in paths]


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = ArgumentParser(description="Turn a REFER dataset into one folder of Parquet files, images included.")
    parser.add_argument("root", type=str, help="REFER folder: <root>/<dataset>/refs(<split_by>).p and instances.json")
    parser.add_argument(
        "--dataset", type=str, default="refcoco", help="refcoco, refcoco+, refcocog, grefcoco or the like"
    )
    parser.add_argument("--split_by", type=str, default="unc", help="whose split: unc, umd or google")
    parser.add_argument(
        "--image_dir", type=str | None, default=None, help="folder of the images; default: under the root"
    )
    parser.add_argument(
        "--orientation",
        type=Orientation,
        default="by_source",
        help="which pixels masks are drawn on where an image has an orientation tag, see data.orientation",
    )
    parser.add_argument("--output", type=str, required=True, help="folder to make")
    options = parser.parse_args(arguments)

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prepare_refer(
        options.root,
        options.output,
        options.dataset,
        options.split_by,
        options.image_dir,
        orientation=options.orientation,
    )
    logger.info("%s is ready: its README.md says what it holds.", options.output)


if __name__ == "__main__":
    run_command(main)
