"""Instances in COCO's JSON form, with a phrase in each annotation or phrases made of categories and attributes (ours)."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from training.sources.agreement import draw_checked
from training.sources.annotations import AnnotatedImage, Annotation, Findings, PhraseMaker, refuse_twice
from training.sources.images import find_image
from training.sources.refer_records import box_problem, image_problem, is_id, is_text, load_instances, shown


def read_coco(
    path: Path, findings: Findings, phrases: PhraseMaker, image_dir: Path | None = None, split_field: str = "split"
) -> Iterator[AnnotatedImage]:
    """The images of a COCO file, in its order.

    Args:
        path: JSON with lists of images and annotations, and of categories where the annotations have any.
        findings: Gets the annotations that cannot be used.
        phrases: Makes an annotation's phrases; its attributes are fields too.
        image_dir: Folder that file names start from. None: the file's folder, the one above, or a folder images in one of them.
        split_field: Field of an image's record that names its split, where there is one.

    Raises:
        ValueError: Where the file is none of COCO's, two records have one id, or two images are one file.
    """
    instances = load_instances(path, optional=("categories",))
    folders = (
        [image_dir]
        if image_dir
        else [path.parent, path.parent / "images", path.parent.parent / "images", path.parent.parent]
    )
    by_image: dict[int, list[Annotation]] = {image_id: [] for image_id in instances["images"]}
    for record in instances["annotations"].values():
        place = f"{path}, annotation {record['id']}"
        problem = _problem(record, instances, path.name)
        if problem is None:
            by_image[record["image_id"]].append(_annotation(place, record, instances, phrases))
        else:
            findings.problems.append(f"{place}: {problem}")
    phrases.check_names(str(path))
    seen: dict[str, str] = {}
    for image_id, annotations in by_image.items():
        place = f"{path}, image {image_id}"
        record = instances["images"][image_id]
        problem = image_problem(image_id, instances, path.name)
        file = None
        if problem is None:
            try:
                file = find_image(record["file_name"], folders)
            except ValueError as error:
                problem = str(error)
        if file is None:
            if annotations or problem is None:
                findings.problems.append(f"{place}: {problem}")
            else:
                findings.count(
                    "images without an annotation cannot be used either", f"{record.get('file_name')}: {problem}"
                )
            continue
        refuse_twice(seen, str(file), place, "it has the file")
        split = record.get(split_field)
        yield AnnotatedImage(
            place=place,
            image={"path": str(file), "bytes": None},
            annotations=annotations,
            size=(record["height"], record["width"]),
            split=None if split is None else str(split),
        )


def _problem(record: Mapping[str, Any], instances: Mapping[str, Any], file: str) -> str | None:
    """Says why an annotation's record cannot be used, or None. Its image is looked at later."""
    image_id, category_id = record.get("image_id"), record.get("category_id")
    if not is_id(image_id) or image_id not in instances["images"]:
        return f"its image {shown(image_id)} is missing in {file}"
    category = instances["categories"].get(category_id) if is_id(category_id) else None
    if category_id is not None and instances["categories"] and (category is None or not is_text(category.get("name"))):
        return f"its category {shown(category_id)} is missing in {file}, or has no name"
    if not isinstance(record.get("attributes", {}), Mapping):
        return f"its attributes must be names with values, got {shown(record['attributes'])}"
    return box_problem(record) if record.get("bbox") else None


def _annotation(
    place: str, record: Mapping[str, Any], instances: Mapping[str, Any], phrases: PhraseMaker
) -> Annotation:
    category = instances["categories"].get(record.get("category_id"), {}).get("name", "")
    return Annotation(
        place=place,
        phrases=phrases(category, {**record.get("attributes", {}), **record}),
        draw=partial(draw_checked, record.get("segmentation"), box=record.get("bbox") or None, area=record.get("area")),
        category=category,
        ann_id=record["id"],
    )


__all__ = ["read_coco"]
