"""What do the checks of the preparation cost on legal rows, as a share of decoding their images?

`python benchmarks/row_checks.py` makes 10,000 random rows in REFER's layout and checks them as `training/preparation.py` does.
Times are those of the process on its CPUs, so other work on the machine changes them little.
"""

import argparse
import json
import pickle
import tempfile
import time
from pathlib import Path

import numpy as np
from dataset_segmentation import image_bytes

from training.examples.batches import group_by_image
from training.examples.prepared_folders import check_images
from training.sources.refer import load_refer
from training.sources.row_checks import check_rows, count_doubtful
from training.support.environment import command_line, describe_hardware, library_versions
from training.support.files import write_text

SIZE = (640, 480)  # of the images, (width, height): that of most photographs of COCO
SENTENCES = 3


def write_rows(root: Path, number: int) -> None:
    """A REFER folder with one object, a random polygon, in each of a number of images."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    (root / "refcoco").mkdir()
    refs, annotations, images = [], [], []
    for i in range(number):
        (root / "images" / f"{i}.jpg").write_bytes(image_bytes(i, SIZE))
        corners = int(rng.integers(10, 60))
        angles, radii = np.sort(rng.uniform(0, 2 * np.pi, corners)), rng.uniform(30, 75, corners)
        points = rng.uniform(80, 160, 2) + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
        points = points.clip(1, np.array(SIZE) - 1)
        box = [*points.min(axis=0).tolist(), *np.ptp(points, axis=0).tolist()]
        record = {"id": i, "image_id": i, "category_id": 1, "bbox": box, "segmentation": [points.ravel().tolist()]}
        annotations.append(record)
        images.append({"id": i, "file_name": f"{i}.jpg", "height": SIZE[1], "width": SIZE[0]})
        said = [{"sent_id": SENTENCES * i + k, "sent": f"thing {i} {k}"} for k in range(SENTENCES)]
        refs.append({"ref_id": i, "ann_id": i, "image_id": i, "split": "train", "sentences": said})
    (root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs))
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (root / "refcoco" / "instances.json").write_text(json.dumps(content))


def measure(number: int) -> dict[str, float]:
    """Seconds of the checks and of decoding, and the share of the first in the second."""
    with tempfile.TemporaryDirectory() as place:
        write_rows(Path(place), number)
        rows = load_refer(place)["train"]
        started = time.process_time()
        check_rows(rows, "the rows")
        count_doubtful(rows)
        group_by_image(rows, None)
        checked = time.process_time()
        check_images({"train": rows}, "by_source")
        decoded = time.process_time()
    return {
        "checks_s": checked - started,
        "decoding_s": decoded - checked,
        "share": (checked - started) / (decoded - checked),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000, help="number of rows (default: %(default)s)")
    parser.add_argument("--output", metavar="FILE", help="JSON file for the record")
    options = parser.parse_args()
    record = {"rows": options.rows, **measure(options.rows), "command": command_line("benchmarks/row_checks.py", None)}
    record |= {"hardware": describe_hardware(), "versions": library_versions()}
    print(f"checks {record['checks_s']:.2f} s, decoding {record['decoding_s']:.2f} s: {record['share']:.1%}")
    if options.output:
        write_text(Path(options.output), json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
