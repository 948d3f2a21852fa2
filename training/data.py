"""The data room: masks as COCO run-length codes, images, and the REFER datasets (RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO).

The run-length code is COCO's, computed by pycocotools; the layout is REFER's (Kazemzadeh et al., "ReferItGame", 2014;
Yu et al., "Modeling Context in Referring Expressions", 2016) and its extension to any number of targets (Liu et al.,
"GRES: Generalized Referring Expression Segmentation", 2023); the rest is ours.
"""

import copyreg
import io
import json
import math
import pickle
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
from pycocotools import mask as coco_mask

# One row is one referred object. Images stay undecoded, so that open_image can name a corrupt one.
REFER_FEATURES = datasets.Features(
    {
        "image": datasets.Image(decode=False),
        "image_id": datasets.Value("int64"),
        "ref_id": datasets.Value("int64"),
        "ann_ids": datasets.List(datasets.Value("int64")),  # one; several or none in gRefCOCO
        "no_target": datasets.Value("bool"),  # nothing in the image is meant; the mask is then empty
        "category": datasets.Value("string"),
        "sentences": datasets.List(datasets.Value("string")),
        "sentence_ids": datasets.List(datasets.Value("int64")),
        "sentence_kinds": datasets.List(datasets.Value("string")),
        "mask": {"size": datasets.List(datasets.Value("int32")), "counts": datasets.Value("string")},
        "boxes": datasets.List(
            datasets.List(datasets.Value("float32"))
        ),  # [x, y, width, height] in pixels, one per annotation
    }
)

# Where the photographs lie below the root: REFER's own layout first, then plain COCO trees.
IMAGE_FOLDERS = ("images/mscoco/images/train2014", "images/train2014", "train2014", "images")

# Polygons are clipped this many pixels outside the image: pycocotools then rounds at the border as ever.
CLIP_MARGIN = 1.0

# Beyond this, float64 no longer resolves a pixel and a clipped edge would land anywhere.
MAX_COORDINATE = 1e15


# Masks


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encodes a bool mask (H, W) as a COCO compressed run-length code {"size": [H, W], "counts": str}.

    Raises ValueError when `mask` is not a bool array with two sides of at least one pixel.
    """
    if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.ndim != 2 or mask.size == 0:
        given = f"{mask.dtype} {mask.shape}" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise ValueError(f"a mask must be a non-empty bool array (height, width), got {given}")
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}


def decode_mask(rle: Mapping[str, Any]) -> np.ndarray:
    """Decodes a COCO run-length code {"size": [H, W], "counts": str, bytes or list} to a bool mask (H, W).

    Raises ValueError when the code is damaged or its runs do not add up to H * W pixels.
    """
    return coco_mask.decode(_checked_rle(rle)).astype(bool)


def segmentation_to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Turns a COCO `segmentation` of an image of `height` x `width` pixels into a code like encode_mask's.

    Takes COCO's three forms: a list of polygons [x0, y0, x1, y1, ...] in pixels, whose union is meant; a
    run-length code, uncompressed (`counts` a list) or compressed (str or bytes). What lies outside the image
    is cut off. A polygon of one or two points (COCO holds a few) has no area and adds nothing.

    Raises ValueError for anything malformed: an odd number of coordinates, coordinates that are not finite,
    no polygon of three points or more, a run-length code that is damaged or of another size than the image.
    """
    if isinstance(segmentation, Mapping):
        rle = _checked_rle(segmentation)
        if rle["size"] != [height, width]:
            raise ValueError(f"the run-length code has the size {rle['size']}, its image {[height, width]}")
        return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
    if not isinstance(segmentation, (list, tuple)):
        given = type(segmentation).__name__
        raise ValueError(f"a segmentation is a list of polygons or a run-length code, got {given}")
    polygons = [points for points in map(_polygon_points, segmentation) if len(points) >= 3]
    if not polygons:
        raise ValueError("the segmentation has no polygon of at least 3 points")
    visible = [points for points in (_clip(points, height, width) for points in polygons) if len(points) >= 3]
    if not visible:
        return encode_mask(np.zeros((height, width), dtype=bool))
    rles = coco_mask.frPyObjects([points.ravel().tolist() for points in visible], height, width)
    return {"size": [height, width], "counts": coco_mask.merge(rles)["counts"].decode("ascii")}


def merge_rles(rles: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The union of one or more codes that encode_mask or segmentation_to_rle gave, all of one size, as such a code."""
    merged = coco_mask.merge([{"size": rle["size"], "counts": rle["counts"].encode("ascii")} for rle in rles])
    return {"size": list(rles[0]["size"]), "counts": merged["counts"].decode("ascii")}


def _checked_rle(rle: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {"size": [H, W], "counts": compressed bytes}; raises ValueError for a damaged code, with which
    pycocotools would read and write out of bounds."""
    size, counts = rle.get("size"), rle.get("counts")
    is_pair = isinstance(size, (list, tuple)) and len(size) == 2
    if not is_pair or not all(isinstance(side, Integral) and side > 0 for side in size):
        raise ValueError(f"the size of a run-length code is [height, width] in pixels, got {size!r}")
    size = [int(side) for side in size]
    if isinstance(counts, str):
        counts = counts.encode("utf-8", "surrogatepass")
    if isinstance(counts, bytes):
        runs = _decompress_runs(counts)
    elif isinstance(counts, (list, tuple)) and all(isinstance(run, Integral) for run in counts):
        runs = [int(run) for run in counts]
    else:
        raise ValueError(f"the counts of a run-length code are whole numbers or text, got {str(counts)[:60]}")
    if sum(runs) != math.prod(size) or min(runs) < 0:
        raise ValueError(f"the runs must be >= 0 and fill a mask of size {size}, they add up to {sum(runs)}")
    if not isinstance(counts, bytes):
        counts = coco_mask.frPyObjects({"size": size, "counts": runs}, *size)["counts"]
    return {"size": size, "counts": counts}


def _decompress_runs(counts: bytes) -> list[int]:
    """Reads COCO's compressed counts; raises ValueError where they are damaged.

    Each character, counted from "0", holds five bits of a number, low bits first, and a sixth for "more
    follow"; the highest bit is the sign. The fourth run and later ones are differences to the one two before.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = character - ord("0")
        if not 0 <= bits < 64:
            raise ValueError(f"the counts of a run-length code hold the character {chr(character)!r}")
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            if bits & 0x10:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    if shift:
        raise ValueError("the counts of a run-length code end in the middle of a number")
    return runs


def _polygon_points(polygon: Any) -> np.ndarray:
    """Returns a flat COCO polygon as points (N, 2), x before y, in pixels. Raises ValueError."""
    if not isinstance(polygon, (list, tuple)) or not all(isinstance(number, Real) for number in polygon):
        raise ValueError(f"a polygon is a flat list of numbers [x0, y0, x1, ...], got {str(polygon)[:60]}")
    if len(polygon) % 2:
        raise ValueError(f"a polygon needs an even number of coordinates, got {len(polygon)}")
    for number in polygon:
        if not abs(number) <= MAX_COORDINATE:
            raise ValueError(f"the coordinates of a polygon must be finite and sensible, got {number}")
    return np.array(polygon, dtype=np.float64).reshape(-1, 2)


def _clip(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Clips a polygon (N, 2) to the image and its margin; returns points (M, 2), none when it lies outside.

    pycocotools walks every edge in full, outside the image too: time and memory grow with the coordinates.
    After Sutherland and Hodgman, "Reentrant polygon clipping", 1974, one side of the frame after the other;
    the pieces of a concave polygon stay joined by edges along the frame, which enclose nothing.
    """
    for axis, side in ((0, width), (1, height)):
        for bound, inward in ((-CLIP_MARGIN, 1.0), (side + CLIP_MARGIN, -1.0)):
            depth = inward * (points[:, axis] - bound)
            if (depth >= 0).all():
                continue
            kept: list[np.ndarray] = []
            for i in range(len(points)):
                if (depth[i - 1] < 0) != (depth[i] < 0):
                    share = depth[i - 1] / (depth[i - 1] - depth[i])
                    crossing = points[i - 1] + share * (points[i] - points[i - 1])
                    crossing[axis] = bound
                    kept.append(crossing)
                if depth[i] >= 0:
                    kept.append(points[i])
            points = np.array(kept, dtype=np.float64).reshape(-1, 2)
    return points


# Images


def open_image(value: Mapping[str, Any] | PIL.Image.Image, decode: bool = True) -> PIL.Image.Image:
    """Decodes the `image` of a row, {"path": str or None, "bytes": bytes or None}, or a PIL image, in full.

    Without `decode` only the head is read, which is enough for the size. The image keeps its mode and its EXIF
    orientation: the image processor takes care of both. Raises ValueError naming the file when it is missing,
    empty, truncated (as far as it is read), no image, or above Pillow's limit.
    """
    if isinstance(value, PIL.Image.Image):
        path, data = getattr(value, "filename", None), None
    else:
        path, data = value.get("path"), value.get("bytes")
        if data is None and not path:
            raise ValueError("an image needs a path or bytes, got neither")
    name = path or "(given without a path)"
    try:
        # From memory, so that no file stays open however late a decoder reads its metadata.
        if not isinstance(value, PIL.Image.Image):
            value = PIL.Image.open(io.BytesIO(Path(path).read_bytes() if data is None else data))
        if decode:
            value.load()
        return value
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"the image {name} is damaged, or not an image") from error
    except Exception as error:  # damaged files make Pillow's decoders raise almost anything
        raise ValueError(f"the image {name} cannot be read: {error}") from error


# Pickles


class _PlainUnpickler(pickle.Unpickler):
    """Without names to call, an unpickler builds plain containers, strings, bytes, numbers and None only."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(f"it refers to an object outside the file, persistent id {pid!r}")


def load_plain_pickle(path: str | PathLike[str]) -> Any:
    """Loads a pickle of plain containers, strings, bytes and numbers; nothing in it is ever called.

    Python 2's byte strings are read as UTF-8 or, when one in the file is not UTF-8, all of them as Latin-1.
    Python 3's bytes below protocol 3 and sets below protocol 4 are written by name and so refused. Raises
    FileNotFoundError, or pickle.UnpicklingError naming the file when it names a class or function (which),
    uses persistent ids or extension codes, is truncated, or is no pickle.
    """
    data = Path(path).read_bytes()
    # An extension code that this process has met before would be served from this cache, past find_class.
    copyreg.clear_extension_cache()
    for encoding in ("utf-8", "latin-1"):
        try:
            return _PlainUnpickler(io.BytesIO(data), encoding=encoding).load()
        except UnicodeDecodeError as error:
            failure: Exception = error
        except Exception as error:  # a damaged stream makes the unpickler raise almost anything
            failure = error
            break
    reason = str(failure) or type(failure).__name__
    raise pickle.UnpicklingError(
        f"{path} is refused: {reason} (accepted: a pickle of plain containers, strings, bytes and numbers)"
    ) from failure


# REFER

# The records of instances.json: "images", "annotations" and "categories", each by id.
_Instances = dict[str, dict[int, dict[str, Any]]]


def load_refer(
    root: str | PathLike[str],
    dataset: str = "refcoco",
    split_by: str = "unc",
    image_dir: str | PathLike[str] | None = None,
    splits: Sequence[str] | None = None,
) -> datasets.DatasetDict:
    """Reads `root`/`dataset`/refs(`split_by`).p, or gRefCOCO's grefs(`split_by`).json, and instances.json.

    Gives Datasets of REFER_FEATURES: one row per ref in the order of the file, official split names and ids;
    sentences are REFER's cleaned `sent`. A ref to several annotations has the union of their masks, one to none
    (`no_target`, or the annotation -1) a mask without a pixel. Images are stored as absolute paths: the file name
    of instances.json (not the ref's) in `image_dir` or, without it, in the IMAGE_FOLDERS below `root`. Masks have
    the size that instances.json states. `splits` chooses splits and their order, all by default; the refs of others
    are not looked at.

    Raises FileNotFoundError for a missing folder or file, pickle.UnpicklingError for refs that are not plain
    data, ValueError for an unknown split, an instances.json that is none, or refs that cannot be used: how
    many, which is the first, and why. All are checked before the first mask is drawn; drawing then refuses a
    malformed segmentation and an empty mask of a ref that has a target, naming the ref.
    """
    root = Path(root).expanduser().absolute()
    refs_path, instances_path = _refer_files(root, dataset, split_by)
    folders = _image_folders(root, image_dir)
    refs = _load_refs(refs_path)
    present = list(dict.fromkeys(ref["split"] for ref in refs))
    for split in splits or ():
        if split not in present:
            raise ValueError(f"{refs_path} has no split {split!r}; it has {', '.join(present) or 'none'}")
    names = present if splits is None else splits
    chosen = {name: [ref for ref in refs if ref["split"] == name] for name in names}

    instances = _load_instances(instances_path)
    problems: list[str] = []
    images: dict[int, Path] = {}
    for ref in (ref for split_refs in chosen.values() for ref in split_refs):
        problem = _ref_problem(ref, instances)
        if problem is None:
            image_id, file_name = ref["image_id"], instances["images"][ref["image_id"]]["file_name"]
            paths = (folder / file_name for folder in folders)
            found = images.get(image_id) or next((path for path in paths if path.is_file()), None)
            if found is None:
                problem = f"its image {folders[0] / file_name} does not exist"
            else:
                images[image_id] = found
        if problem is not None:
            problems.append(f"ref {ref.get('ref_id')}: {problem}")
    if problems:
        raise ValueError(f"{refs_path}: {len(problems)} refs cannot be used; the first is {problems[0]}")

    built = {}
    for name, split_refs in chosen.items():
        rows = [_build_row(ref, instances, images[ref["image_id"]], instances_path, dataset) for ref in split_refs]
        columns = {column: [row[column] for row in rows] for column in REFER_FEATURES}
        built[name] = datasets.Dataset.from_dict(columns, features=REFER_FEATURES)
    return datasets.DatasetDict(built)


def refer_image_ids(root: str | PathLike[str], dataset: str, split_by: str) -> dict[str, list[int]]:
    """The `image_id` of every ref of each split of a REFER dataset, from its refs alone: nothing else is read.

    Raises as load_refer does; ValueError also for a ref whose image_id is no integer.
    """
    refs_path, _ = _refer_files(Path(root).expanduser().absolute(), dataset, split_by)
    images: dict[str, list[int]] = {}
    for ref in _load_refs(refs_path):
        if not isinstance(ref.get("image_id"), int):
            raise ValueError(
                f"{refs_path}: ref {ref.get('ref_id')}: its image_id must be an integer, got {ref.get('image_id')!r}"
            )
        images.setdefault(ref["split"], []).append(ref["image_id"])
    return images


def _refer_files(root: Path, dataset: str, split_by: str) -> tuple[Path, Path]:
    """Returns the paths of refs and instances; a FileNotFoundError says which refs there are instead."""
    if not root.is_dir():
        raise FileNotFoundError(f"the REFER root {root} is not a folder")
    refs, generalized = root / dataset / f"refs({split_by}).p", root / dataset / f"grefs({split_by}).json"
    paths = generalized if generalized.is_file() and not refs.is_file() else refs, root / dataset / "instances.json"
    for path in paths:
        if not path.is_file():
            files = [path for pattern in ("*/refs(*).p", "*/grefs(*).json") for path in root.glob(pattern)]
            found = sorted(str(refs.relative_to(root)) for refs in files)
            raise FileNotFoundError(
                f"{path} does not exist (needed: <root>/<dataset>/refs(<split_by>).p, or grefs(<split_by>).json, "
                f"and instances.json); refs found below {root}: {', '.join(found) or 'none'}"
            )
    return paths


def _load_refs(path: Path) -> list[dict[str, Any]]:
    """Reads the refs of either file; raises pickle.UnpicklingError or ValueError naming it when it is something else."""
    if path.suffix == ".json":
        try:
            refs = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    else:
        refs = load_plain_pickle(path)
    is_refs = isinstance(refs, list) and all(isinstance(ref, dict) for ref in refs)
    if not is_refs or not all(isinstance(ref.get("split"), str) for ref in refs):
        raise ValueError(f"{path} must hold a list of refs, dicts that each name their split")
    return refs


def _image_folders(root: Path, image_dir: str | PathLike[str] | None) -> list[Path]:
    """Returns the existing folders to look for images in; raises FileNotFoundError when there is none."""
    folders = [root / name for name in IMAGE_FOLDERS]
    if image_dir is not None:
        folders = [Path(image_dir).expanduser().absolute()]
    existing = [folder for folder in folders if folder.is_dir()]
    if not existing:
        raise FileNotFoundError(f"no folder of images, looked for {', '.join(map(str, folders))}")
    return existing


def _load_instances(path: Path) -> _Instances:
    """Reads instances.json; raises ValueError naming the file when it is something else."""
    try:
        content = json.loads(path.read_bytes())
        tables = ("images", "annotations", "categories")
        return {table: {record["id"]: record for record in content[table]} for table in tables}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON with lists of images, annotations and categories that have ids: {error!r}"
        ) from error


def _target_ids(ref: dict[str, Any]) -> list[int]:
    """The annotations that a checked ref means: one, several, or none where gRefCOCO writes -1."""
    given = ref["ann_id"] if isinstance(ref["ann_id"], (list, tuple)) else [ref["ann_id"]]
    return [] if list(given) == [-1] else list(dict.fromkeys(given))


def _ref_problem(ref: dict[str, Any], instances: _Instances) -> str | None:
    """Says why a ref cannot be used, as far as the records tell, or None."""
    for key in ("ref_id", "image_id"):
        if not isinstance(ref.get(key), int):
            return f"its {key} must be an integer, got {ref.get(key)!r}"
    given = ref.get("ann_id")
    is_list = isinstance(given, (list, tuple)) and given and all(isinstance(ann_id, int) for ann_id in given)
    if not is_list and not isinstance(given, int):
        return f"its ann_id must be an integer or a list of integers, got {given!r}"
    image = instances["images"].get(ref["image_id"])
    if image is None:
        return f"its image {ref['image_id']} is missing in instances.json"
    has_size = all(isinstance(image.get(side), int) and image[side] > 0 for side in ("height", "width"))
    if not has_size or not isinstance(image.get("file_name"), str):
        return f"its image {ref['image_id']} needs file_name, height and width in instances.json, got {image}"
    targets = _target_ids(ref)
    if targets and ref.get("no_target"):
        return f"it says that it has no target, and names the annotations {targets}"
    problems = (_annotation_problem(ann_id, ref["image_id"], instances) for ann_id in targets)
    return next((problem for problem in problems if problem is not None), _sentence_problem(ref))


def _annotation_problem(ann_id: int, image_id: int, instances: _Instances) -> str | None:
    """Says why an annotation cannot be a target in an image, or None."""
    annotation = instances["annotations"].get(ann_id)
    if annotation is None:
        return f"its annotation {ann_id} is missing in instances.json"
    if annotation.get("image_id") != image_id:
        return f"it is about image {image_id}, its annotation {ann_id} about {annotation.get('image_id')}"
    category_id, bbox = annotation.get("category_id"), annotation.get("bbox")
    if not isinstance(instances["categories"].get(category_id, {}).get("name"), str):
        return f"the category {category_id} of its annotation {ann_id} is missing in instances.json"
    is_box = isinstance(bbox, list) and len(bbox) == 4
    if not is_box or not all(isinstance(number, Real) and math.isfinite(number) for number in bbox):
        return f"the bbox of its annotation {ann_id} must be 4 finite numbers, got {bbox}"
    return None


def _sentence_problem(ref: dict[str, Any]) -> str | None:
    """Says what is wrong with a ref's sentences, or None."""
    if not isinstance(ref.get("sentences"), list) or not ref["sentences"]:
        return "it has no sentences"
    for sentence in ref["sentences"]:
        if not isinstance(sentence, dict) or not isinstance(sentence.get("sent_id"), int):
            return f"one of its sentences has no sent_id: {sentence!r}"
        text = sentence.get("sent")
        if not isinstance(text, str) or not text.strip():
            return f"its sentence {sentence['sent_id']} is empty or not a text: {text!r}"
        if any("\ud800" <= character <= "\udfff" for character in text):
            return f"its sentence {sentence['sent_id']} is not valid Unicode: {text!r}"
    return None


def _build_row(
    ref: dict[str, Any], instances: _Instances, image_path: Path, source: Path, dataset: str
) -> dict[str, Any]:
    """Joins a checked ref with its records and draws its mask; raises ValueError naming the ref."""
    image, targets = instances["images"][ref["image_id"]], _target_ids(ref)
    annotations = [instances["annotations"][ann_id] for ann_id in targets]
    rles = [encode_mask(np.zeros((image["height"], image["width"]), dtype=bool))]
    for annotation in annotations:
        try:
            rles.append(segmentation_to_rle(annotation.get("segmentation"), image["height"], image["width"]))
        except ValueError as error:
            where = f"ref {ref['ref_id']}: its annotation {annotation['id']} in {source}"
            raise ValueError(f"{where} is malformed: {error}") from error
    mask = merge_rles(rles)
    if targets and coco_mask.area(mask) == 0:
        where = f"ref {ref['ref_id']}: its annotation {', '.join(map(str, targets))} in {source}"
        raise ValueError(f"{where} has no pixel in its image of {image['height']} x {image['width']}")
    names = (instances["categories"][annotation["category_id"]]["name"] for annotation in annotations)
    return {
        "image": {"path": str(image_path), "bytes": None},
        "image_id": ref["image_id"],
        "ref_id": ref["ref_id"],
        "ann_ids": targets,
        "no_target": not targets,
        "category": ", ".join(dict.fromkeys(names)),
        "sentences": [sentence["sent"].strip() for sentence in ref["sentences"]],
        "sentence_ids": [sentence["sent_id"] for sentence in ref["sentences"]],
        "sentence_kinds": [dataset] * len(ref["sentences"]),
        "mask": mask,
        "boxes": [annotation["bbox"] for annotation in annotations],
    }
