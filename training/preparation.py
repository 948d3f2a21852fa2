"""Turn annotated images into one folder that loads by itself, images and masks included.

`python training/preparation.py refer REFER_ROOT --dataset refcoco --split_by unc --output prepared/refcoco`, or `coco`, `labelme`,
`cvat`, `folder` and `hub` for annotations of your own; then `datasets.load_dataset("prepared/refcoco")` gives rows of
`training.sources.refer.REFER_FEATURES`, and so does `--data.source folder`.
"""

import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from jsonargparse import ArgumentParser

from training.configuration import Orientation
from training.examples.prepared_folders import (
    SHARD_BYTES,
    check_images,
    check_split_name,
    describe_turned,
    new_output,
    write_prepared,
)
from training.scoring.example_sheet import draw_rows
from training.sources.annotations import AnnotatedImage, Findings, PhraseMaker
from training.sources.coco_records import read_coco
from training.sources.cvat_records import read_cvat
from training.sources.hub_columns import HubColumns, read_hub
from training.sources.images import upright_for
from training.sources.labelme_records import read_labelme
from training.sources.mask_folder import TableColumns, read_mask_folder
from training.sources.own_rows import VAL_SHARE, make_rows
from training.sources.published_counts import PUBLISHED_REFS
from training.sources.refer import load_refer
from training.sources.row_checks import count_doubtful
from training.support.commands import run_command
from training.support.files import write_text

logger = logging.getLogger(__name__)

# Reads one of the files, folders or data sets that the command names.
Reader = Callable[[str, Findings], Iterator[AnnotatedImage]]


def prepare_refer(
    root: str | PathLike[str],
    output: str | PathLike[str],
    dataset: str = "refcoco",
    split_by: str = "unc",
    image_dir: str | PathLike[str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    orientation: Orientation = "by_source",
) -> None:
    """Write every split of a REFER dataset to `output`, see [`write_prepared`].

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
    output, name = new_output(output), f"{dataset} ({split_by})"
    loaded = load_refer(root, dataset, split_by, image_dir=image_dir)
    for split in loaded:
        check_split_name(split, name)
    splits = {split: rows.select(np.argsort(rows["image_id"], kind="stable")) for split, rows in loaded.items()}
    turned = check_images(splits, orientation)
    doubtful = sum(map(count_doubtful, splits.values()))
    notes = [_compare(splits, dataset, split_by)]
    if turned:
        notes.append(describe_turned(turned, orientation))
        logger.warning("%s", notes[-1])
    if doubtful:
        notes.append(f"{doubtful} masks agree only roughly with their boxes.")
    write_prepared(splits, output, name, notes, shard_bytes=shard_bytes)


def prepare_own(
    sources: Sequence[str],
    reader: Reader,
    output: str | PathLike[str],
    val_share: float | None = None,
    orientation: Orientation = "by_source",
    skip_unusable: bool = False,
) -> None:
    """Write annotations of one's own to `output`, see [`write_prepared`], with a sheet `examples.png` to check by eye.

    Args:
        sources: What the reader takes, each as it is or after its split: "train=a.json". Without splits and without a `val_share`
            the splits are those that the data name, or VAL_SHARE of the images are for validation.
        reader: Yields the annotated images of a source.
        output: Folder to make.
        val_share: Share of the images for the split val, in [0, 1).
        orientation: Which pixels masks are drawn on, as `data.orientation` has it; images are embedded as they are.
        skip_unusable: Leave out what cannot be used, and list it in `left-out.txt`, instead of refusing all.

    Raises:
        FileExistsError: Where something stands at `output` already.
        FileNotFoundError, ValueError: Where the annotations cannot be read or used. Before anything is written.
    """
    output, findings, named = new_output(output), Findings(), _named_splits(sources)
    if val_share is not None and not 0 <= val_share < 1:
        raise ValueError(f"--val_share must be from 0 on and below 1, got {val_share}.")
    if named[0][0] is not None and val_share is not None:
        raise ValueError("--val_share and named splits (SPLIT=PATH) exclude each other.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        images = _read_sources(named, reader, findings)
        made = make_rows(
            images,
            findings,
            output.name,
            Path(scratch),
            val_share=val_share,
            orientation=orientation,
            skip_unusable=skip_unusable,
        )
        notes = [describe_turned(made.turned, orientation)] if made.turned else []
        notes += findings.notes()
        if missing := [split for split in ("train", "val") if split not in made.splits]:
            notes.append(f"There is no split {' and no split '.join(missing)}; training needs both.")
        for note in notes:
            logger.warning("%s", note)
        notes.insert(0, made.division)
        logger.info("%s", made.division)

        def also(folder: Path) -> None:
            draw_rows(made.splits, upright_for(orientation), folder / "examples.png")
            if findings.problems:
                write_text(folder / "left-out.txt", "".join(f"{problem}\n" for problem in findings.problems))

        write_prepared(made.splits, output, output.name, notes, also=also)


def _named_splits(sources: Sequence[str]) -> list[tuple[str | None, str]]:
    """Each source with its split: "train=a.json", or None where none has one."""
    named: list[tuple[str | None, str]] = []
    for source in sources:
        found = re.fullmatch(r"(\w+)=(.+)", source)
        named.append((found[1], found[2]) if found and not Path(source).exists() else (None, source))
    if len({split is None for split, _ in named}) > 1:
        raise ValueError(f"Name a split for each or for none, SPLIT=PATH, got {' '.join(sources)}.")
    return named


def _read_sources(
    named: Sequence[tuple[str | None, str]], reader: Reader, findings: Findings
) -> Iterator[AnnotatedImage]:
    for split, source in named:
        for image in reader(source, findings):
            yield image if split is None else replace(image, split=split)


def _compare(splits: Mapping[str, datasets.Dataset], dataset: str, split_by: str) -> str:
    """How the numbers of refs compare with the published ones, in a sentence. Differences are a warning too."""
    if (dataset, split_by) not in PUBLISHED_REFS:
        return "There are no published counts to compare with."
    verdict = compare_with_published({split: len(rows) for split, rows in splits.items()}, dataset, split_by)
    if not verdict:
        return "The numbers of refs are the published ones."
    logger.warning("%s (%s) is not as published: %s.", dataset, split_by, verdict)
    return f"**The counts are not the published ones**: {verdict}."


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


# Readers, as the options of each sub-command say


def _existing(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"There is no {source}.")
    return path


def _folder(option: str | None) -> Path | None:
    if option is None:
        return None
    path = Path(option).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"There is no folder {option}.")
    return path


def _reader(form: str, options: Any) -> Reader:
    if form == "hub":
        columns = HubColumns(options.image_column, options.mask_column, options.text_column, options.category_column)
        return partial(read_hub, columns=columns, subset=options.subset, cut_grey=options.cut_grey)
    image_dir = _folder(options.image_dir)
    if form == "folder":
        columns = TableColumns(
            options.image_column, options.mask_column, options.text_column, options.object_column, options.split_column
        )
        mask_dir, cut_grey = _folder(options.mask_dir), options.cut_grey
        return lambda source, findings: read_mask_folder(
            _existing(source), findings, columns, image_dir, mask_dir, cut_grey
        )
    if form == "labelme":
        return lambda source, findings: read_labelme(_existing(source), findings, options.phrase_field, image_dir)
    read = read_coco if form == "coco" else read_cvat
    return lambda source, findings: read(
        _existing(source),
        findings,
        PhraseMaker(options.phrase_field, options.template),
        image_dir,
        options.split_field,
    )


# The command line


def _own_parser(what: str) -> ArgumentParser:
    """The options that all forms of annotations share."""
    parser = ArgumentParser(description=f"Prepare {what}.")
    parser.add_argument("data", nargs="+", type=str, help=f"{what}; or SPLIT=PATH for each split")
    parser.add_argument("--output", type=str, required=True, help="folder to make")
    parser.add_argument(
        "--val_share",
        type=float | None,
        default=None,
        help=f"share of the images for validation; default: {VAL_SHARE}, or the splits of the data",
    )
    _add_orientation(parser)
    parser.add_argument("--skip_unusable", action="store_true", help="leave out what cannot be used, and list it")
    return parser


def _add_orientation(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--orientation",
        type=Orientation,
        default="by_source",
        help="which pixels masks are drawn on where an image has an orientation tag, see data.orientation",
    )


def _add_texts(parser: ArgumentParser, **helps: str) -> None:
    for name, said in helps.items():
        parser.add_argument(f"--{name}", type=str | None, default=None, help=said)


def _refer_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Prepare a REFER dataset.")
    parser.add_argument("root", type=str, help="REFER folder: <root>/<dataset>/refs(<split_by>).p and instances.json")
    parser.add_argument(
        "--dataset", type=str, default="refcoco", help="refcoco, refcoco+, refcocog, grefcoco or the like"
    )
    parser.add_argument("--split_by", type=str, default="unc", help="whose split: unc, umd or google")
    _add_texts(parser, image_dir="folder of the images; default: under the root")
    _add_orientation(parser)
    parser.add_argument("--output", type=str, required=True, help="folder to make")
    return parser


def preparation_parser() -> ArgumentParser:
    """The options of the command."""
    parser = ArgumentParser(description="Turn annotated images into one folder of Parquet files, images included.")
    forms = parser.add_subcommands(dest="form")
    forms.add_subcommand("refer", _refer_parser(), help="RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO")

    image_dir = "folder that names of images start from; default: beside the annotations, or in a folder images there"
    phrase_field = "field or attribute of an annotation that holds its phrase, or a list of phrases"
    template = "phrase of category and attributes, such as 'the {color} {category}'; default: the category"
    for form, what, split_field, of in (
        ("coco", "JSON files in COCO's form", "split", "field of an image"),
        ("cvat", "XML files of CVAT for images 1.1", "subset", "attribute of an image"),
    ):
        own = _own_parser(what)
        _add_texts(own, phrase_field=phrase_field, template=template, image_dir=image_dir)
        own.add_argument("--split_field", type=str, default=split_field, help=f"{of} that names its split")
        forms.add_subcommand(form, own, help=what)

    own = _own_parser("folders of labelme's JSON files")
    own.add_argument(
        "--phrase_field",
        type=Literal["label", "description"] | None,
        default=None,
        help="what holds the phrase; default: the description, or the label where there is none",
    )
    _add_texts(own, image_dir="folder that names of images start from; default: that of each JSON file")
    forms.add_subcommand("labelme", own, help="folders of labelme's JSON files")

    columns = {
        "image_column": "column of images",
        "mask_column": "column of masks",
        "text_column": "column of phrases",
    }
    own = _own_parser("tables of phrases beside images and masks")
    _add_texts(
        own, **columns, image_dir=image_dir, mask_dir="folder of the masks; default: likewise, in a folder masks"
    )
    own.add_argument("--object_column", type=str, default="object", help="column of an object's number or colour")
    own.add_argument("--split_column", type=str, default="split", help="column of an image's split")
    cut_grey = "cut grey masks at half, instead of refusing them"
    own.add_argument("--cut_grey", action="store_true", help=cut_grey)
    forms.add_subcommand("folder", own, help="images, masks as image files, and a table of phrases")

    own = _own_parser("data of `datasets`, folders or ids on the Hub")
    _add_texts(own, **columns, category_column="column of categories", subset="configuration, where there are several")
    own.add_argument("--cut_grey", action="store_true", help=cut_grey)
    forms.add_subcommand("hub", own, help="data with columns of images, masks and texts")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    chosen = preparation_parser().parse_args(arguments)
    form, options = chosen.form, chosen[chosen.form]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if form == "refer":
        prepare_refer(
            options.root,
            options.output,
            options.dataset,
            options.split_by,
            options.image_dir,
            orientation=options.orientation,
        )
    else:
        reader = _reader(form, options)
        prepare_own(options.data, reader, options.output, options.val_share, options.orientation, options.skip_unusable)
        logger.info("Look at %s: is each mask where its phrase says?", Path(options.output) / "examples.png")
    logger.info("%s is ready: its README.md says what it holds.", options.output)


if __name__ == "__main__":
    run_command(main)
