"""The papers' table of a model: its figures, what is scored again, what is left out, and the comparison of two models."""

import json
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import REFER_MINI, needs_refer_mini
from papers import SETS, write_model, write_sets
from runs import ENVIRONMENT, ON_CPU

from training import evaluation, papers_table, preparation, segment
from training.configuration import DataSettings
from training.scoring.kept_predictions import read_split, write_split
from training.scoring.metric import SentenceScore, summarize
from training.sources.refer_records import load_refs

ALL_COLUMNS = [f"{name}-{by}-{split}" for (name, by), splits in SETS.items() for split in splits if split != "train"]
NUMBERS = ("row", "sentence", "kind", "intersection", "predicted", "truth", "boundary_f", "no_target")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A REFER folder, and the table of a model that was trained on its RefCOCO."""
    place = tmp_path_factory.mktemp("papers")
    write_sets(place / "refer")
    write_model(place / "trial", DataSettings(root=str(place / "refer")), predict_presence=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        table(place / "trial", "--root", place / "refer")
    return place


def table(*arguments: object) -> None:
    papers_table.main([str(argument) for argument in arguments])


def records_in(output: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (output / "evaluations").glob("*.json")}


def scores_in(record: dict) -> list[dict]:
    return [{name: score[name] for name in NUMBERS} for score in record["scores"]]


@pytest.fixture
def no_model(monkeypatch):
    """The model must not be asked."""

    def ask(*arguments, **options):
        raise AssertionError("the model was asked")

    monkeypatch.setattr(papers_table, "answer_sentences", ask)


@pytest.fixture
def copy(place, tmp_path) -> Path:
    """A copy of the model's folder with its table."""
    shutil.copytree(place / "trial", tmp_path / "trial")
    return tmp_path / "trial"


# Figures


@pytest.mark.parametrize(("dataset", "split"), [("refcoco", "testA"), ("grefcoco", "val")])
def test_kept_predictions_and_the_evaluation_command_give_the_same_digits(place, tmp_path, dataset, split):
    data = ["--data.dataset", dataset, "--data.split_by", "unc", "--split", split]
    evaluation.main([str(place / "trial"), *data, "--output", str(tmp_path / "a.json")])
    expected = json.loads((tmp_path / "a.json").read_text())
    record = records_in(place / "trial" / "papers-table")[f"{dataset}-unc-{split}"]
    assert scores_in(record) == scores_in(expected)
    for name in ("counts", "intervals", "slices", "weights", "threshold", "data", "image_ids"):
        assert record[name] == expected[name]
    assert record["summary"] == {"as written": expected["summary"]["as written"]}


def test_the_predictions_can_be_scored_by_anybody(place, tmp_path, no_model):
    folder, output = place / "trial" / "papers-table" / "predictions" / "refcoco-unc-val", tmp_path / "again"
    table("--predictions", folder, "--only", "refcoco-unc-val", "--root", place / "refer", "--output", output)
    again = records_in(output)["refcoco-unc-val"]
    record = records_in(place / "trial" / "papers-table")["refcoco-unc-val"]
    assert again["scores"] == record["scores"] and again["summary"] == record["summary"]
    table("--compare", place / "trial", output)  # of the same data
    assert "What the model was trained on is not known" in (output / "table.md").read_text()


def test_predictions_without_scores_are_scored(place, tmp_path, no_model):
    """As other programs may write them."""
    kept = list(read_split(place / "trial" / "papers-table" / "predictions" / "refcoco-unc-val"))
    bare = [replace(prediction, score=None, no_target=None) for prediction in kept]
    write_split(tmp_path / "others", bare, kept[-1].row + 1)
    table("--predictions", tmp_path / "others", "--only", "refcoco-unc-val", "--root", place / "refer")
    (again,) = records_in(tmp_path / "others").values()
    record = records_in(place / "trial" / "papers-table")["refcoco-unc-val"]
    assert again["summary"] == record["summary"] and "score_quality" in record and "score_quality" not in again


def test_predictions_of_the_command_for_many_images_are_scored_too(place, tmp_path, no_model):
    preparation.prepare_refer(place / "refer", tmp_path / "prepared")
    data = ["--data", str(tmp_path / "prepared"), "--split", "val", "--output", str(tmp_path / "masks")]
    segment.main([str(place / "trial" / "model"), *data, "--part_size", "1"])
    table("--predictions", tmp_path / "masks", "--only", "refcoco-unc-val", "--root", tmp_path / "prepared")
    (again,) = records_in(tmp_path / "masks").values()
    record = records_in(place / "trial" / "papers-table")["refcoco-unc-val"]
    assert again["summary"]["as written"]["all"] == pytest.approx(record["summary"]["as written"]["all"], abs=1e-3)
    assert again["weights"] == record["weights"]
    assert "| RefCOCO val* |" in (tmp_path / "masks" / "table.md").read_text()


@needs_refer_mini
def test_refer_mini_goes_through_all_parts(place, tmp_path):
    """Prepared, segmented as many images, scored, and shown as a part of RefCOCO."""
    root, model = tmp_path / "refer-mini", place / "trial" / "model"
    (root / "refcoco").mkdir(parents=True)
    refs = [ref for ref in load_refs(REFER_MINI / "refcoco" / "refs(unc).p") if ref["split"] == "val"]
    (root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs, 2))
    (root / "refcoco" / "instances.json").symlink_to(REFER_MINI / "refcoco" / "instances.json")
    (root / "images").symlink_to(REFER_MINI / "images")
    preparation.prepare_refer(root, tmp_path / "prepared")
    segment.main(
        [str(model), "--data", str(tmp_path / "prepared"), "--split", "val", "--output", str(tmp_path / "masks")]
    )
    table("--predictions", tmp_path / "masks", "--only", "refcoco-unc-val", "--root", tmp_path / "prepared")
    table(model, "--root", root, "--settings", place / "trial" / "settings.yaml", "--output", tmp_path / "table")
    (kept,), (own,) = (records_in(tmp_path / name).values() for name in ("masks", "table"))
    assert kept["counts"] == own["counts"] and own["counts"]["expressions"] == 241
    assert kept["summary"]["as written"]["all"] == pytest.approx(own["summary"]["as written"]["all"], abs=2e-3)
    for name in ("masks", "table"):
        text = (tmp_path / name / "table.md").read_text()
        assert "| RefCOCO val* | 241 | 75 |" in text and "84 of 3811 published objects" in text


def cells(text: str, start: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_every_split_beside_the_published_rows(place):
    output = place / "trial" / "papers-table"
    assert sorted(records_in(output)) == sorted(ALL_COLUMNS)
    text = (output / "table.md").read_text()
    header, own = cells(text, "| model | metric"), cells(text, "| trial | mIoU")
    assert header[3:5] == ["RefCOCO val", "RefCOCO testA"] and header[-2:] == ["mean of 8", "mean of 9"]
    values = [record["summary"]["as written"]["all"] for record in map(records_in(output).get, ALL_COLUMNS[:9])]
    shown = [float(cell.rstrip("*†")) for cell in own[3:]]
    expected = [100 * value["mIoU"] for value in values]
    assert shown[:9] == pytest.approx(expected, abs=0.05)
    assert shown[9:] == pytest.approx([sum(expected[:8]) / 8, sum(expected) / 9], abs=0.05)
    sera = cells(text, "| SERA | mIoU")
    assert sera[2:8] == ["no", "76.5", "78.2", "73.7", "70.4", "74.4"] and sera[-2:] == ["71.7", "71.1"]
    assert cells(text, "| C3VG | mIoU") == ["C3VG", "mIoU", "yes", *[""] * 9, "78.2", ""]
    generalized = records_in(output)["grefcoco-unc-val"]["summary"]["as written"]["all"]
    assert [float(cell.rstrip("*†")) for cell in cells(text, "| trial | no |")[2:6]] == pytest.approx(
        [100 * generalized[metric] for metric in ("gIoU", "cIoU", "N-acc", "T-acc")], abs=0.05
    )
    assert cells(text, "| DeRIS-B | yes |") == ["DeRIS-B", "yes", "74.1", "", "77.0", *[""] * 9]
    latex = (output / "table.tex").read_text()
    tables = re.findall(r"\\toprule\n(.*?)\\bottomrule", latex, flags=re.DOTALL)
    assert len(tables) == len(re.findall(r"^\|---", text, flags=re.MULTILINE)) == 3
    assert not re.search(r"(?<!\\)[_%]", "".join(tables)) and "RefCOCO+ testB & " in latex


# Again


def test_what_is_scored_is_not_scored_again(place, copy, no_model):
    before = (copy / "papers-table" / "table.md").read_text()
    table(copy, "--root", place / "refer")
    assert (copy / "papers-table" / "table.md").read_text().partition("`python")[0] == before.partition("`python")[0]
    (copy / "papers-table" / "evaluations" / "refcoco-unc-val.json").unlink()  # its predictions are still there
    table(copy, "--root", place / "refer")
    assert records_in(copy / "papers-table")["refcoco-unc-val"] == records_in(place / "trial" / "papers-table")[
        "refcoco-unc-val"
    ] | {"command": "python training/papers_table.py trial --root refer"}


def asked_columns(monkeypatch) -> list[int]:
    """The numbers of rows that the model is asked about, one for each split."""
    asked, answer = [], papers_table.answer_sentences

    def note(model, processor, rows, *arguments, **options):
        asked.append(len(rows))
        return answer(model, processor, rows, *arguments, **options)

    monkeypatch.setattr(papers_table, "answer_sentences", note)
    return asked


def test_an_interrupted_table_goes_on(place, tmp_path, monkeypatch):
    folder = write_model(tmp_path / "trial")
    options = (folder, "--root", place / "refer", "--only", *ALL_COLUMNS[:3])
    keep = papers_table.keep

    def fail(output: Path, *arguments) -> None:
        if output.name == ALL_COLUMNS[1]:
            raise OSError("no space left")
        keep(output, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(papers_table, "keep", fail)
        with pytest.raises(OSError, match="no space left"):
            table(*options)
    asked = asked_columns(monkeypatch)
    table(*options)
    assert len(asked) == 2 and sorted(records_in(folder / "papers-table")) == sorted(ALL_COLUMNS[:3])


@pytest.mark.parametrize("change", ["weights", "settings", "option", "data"])
def test_other_weights_settings_or_data_are_scored_again(place, copy, tmp_path, monkeypatch, change):
    root, options = place / "refer", []
    if change == "weights":
        write_model(copy, seed=1, predict_presence=True)
    elif change == "settings":
        path = copy / "model" / "processor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"mask_threshold": 0.4}))
    elif change == "option":
        options = ["--threshold", "0.4"]
    else:
        root = shutil.copytree(place / "refer", tmp_path / "refer")
        image = root / "images" / "train2014" / "COCO_train2014_000000000004.png"
        image.write_bytes(image.read_bytes() + b"more")
    asked = asked_columns(monkeypatch)
    table(copy, "--root", root, "--only", "refcoco-unc-val", *options)
    assert len(asked) == 1
    table(copy, "--root", root, "--only", "refcoco-unc-val", *options)
    assert len(asked) == 1


def test_masks_are_selected_as_the_processor_does_or_as_asked(place, copy, monkeypatch):
    path = copy / "model" / "processor_config.json"
    changed = {"mask_threshold": "expected_iou", "keep_largest_component": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    only = ("--root", place / "refer", "--only", "refcoco-unc-val")
    asked = asked_columns(monkeypatch)
    table(copy, *only)
    own = records_in(copy / "papers-table")["refcoco-unc-val"]
    assert own["expected_iou"] and own["largest_component"] and own["threshold"]["value"] is None
    table(copy, *only, "--threshold", "0.5", "--no_largest_component")
    plain = records_in(copy / "papers-table")["refcoco-unc-val"]
    assert scores_in(plain) == scores_in(records_in(place / "trial" / "papers-table")["refcoco-unc-val"])
    assert not plain["largest_component"] and plain["threshold"]["source"] == "given" and len(asked) == 2


def test_two_processes_give_the_same_table(place, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    command = [*launch, "--rdzv_endpoint", "localhost:0", "training/papers_table.py", str(place / "trial")]
    command += [
        "--root",
        str(place / "refer"),
        "--output",
        str(tmp_path),
        "--only",
        "refcoco-unc-val",
        "grefcoco-unc-testB",
    ]
    done = subprocess.run(command, env=ENVIRONMENT | ON_CPU, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("refcoco-unc-val: mIoU") == 1
    for name, record in records_in(tmp_path).items():
        one = records_in(place / "trial" / "papers-table")[name]
        assert record["processes"] == 2 and record["counts"] == one["counts"]
        assert record["summary"]["as written"]["all"] == pytest.approx(one["summary"]["as written"]["all"], abs=1e-3)
        predictions = list(read_split(tmp_path / "predictions" / name))
        assert len({(p.row, p.index) for p in predictions}) == len(predictions) == one["counts"]["expressions"]


# Transfer


def test_images_of_the_models_training_are_not_scored(place, tmp_path):
    data = DataSettings(root=str(place / "refer"), dataset="refcocog", split_by="umd")
    folder = write_model(tmp_path / "umd", data)
    table(folder, "--root", place / "refer", "--zero_shot")
    records = records_in(folder / "papers-table")
    assert sorted(records) == sorted(
        set(ALL_COLUMNS) - {"refcocog-umd-val", "refcocog-umd-test", "refcocog-google-val"} - {"grefcoco-unc-testA"}
    )
    record = records["refcoco-unc-testA"]  # images 5 and 8; 5 is one of training's
    assert set(record["image_ids"]) == {8} and record["left_out"]["images"] == 1 and record["left_out"]["objects"] == 3
    everything = records_in(place / "trial" / "papers-table")["refcoco-unc-testA"]["counts"]["expressions"]
    assert record["left_out"]["expressions"] == everything - record["counts"]["expressions"] > 0
    kept = {prediction.row for prediction in read_split(folder / "papers-table" / "predictions" / "refcoco-unc-testA")}
    assert kept == set(record["rows"])  # of the whole split
    text = (folder / "papers-table" / "zero-shot.md").read_text()
    assert "Trained on: RefCOCOg." in text and "2 images with" in text and "SERA" not in text
    own = cells(text, "| umd | mIoU")
    assert own[4].endswith("*†") and own[-4:] == [""] * 4
    assert "| RefCOCO testA*† |" in text


def test_transfer_needs_to_know_the_training(place, tmp_path, capsys):
    folder = write_model(tmp_path / "unknown")
    with pytest.raises(ValueError, match=r"settings.yaml is not there; name the settings"):
        table(folder, "--root", place / "refer", "--zero_shot")
    gone = write_model(tmp_path / "gone", DataSettings(source="folder", root=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="it is not known which images to leave out"):
        table(gone, "--root", place / "refer")


# Comparison


def test_two_models_are_compared_on_the_same_sentences(place, tmp_path, caplog):
    other = write_model(tmp_path / "other", DataSettings(root=str(place / "refer")), seed=5)
    table(other, "--root", place / "refer", "--only", "refcoco-unc-val", "refcoco-unc-testA")
    with caplog.at_level("INFO"):
        table("--compare", place / "trial", other / "model", "--output", tmp_path / "out")
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert text.strip() in caplog.text and "mean of 8" not in [
        line.split("|")[1] for line in text.splitlines() if "|" in line
    ]
    first = records_in(place / "trial" / "papers-table")["refcoco-unc-val"]["summary"]["as written"]["all"]
    second = records_in(other / "papers-table")["refcoco-unc-val"]["summary"]["as written"]["all"]
    row = cells(text, "| RefCOCO val | mIoU")
    assert row[5:7] == [f"{100 * value['mIoU']:.1f}" for value in (first, second)]
    difference = 100 * (first["mIoU"] - second["mIoU"])
    assert float(row[7].split()[0]) == pytest.approx(difference, abs=0.051) and row[7].count("[") == 1
    assert r"\begin{tabular}" in (tmp_path / "out" / "comparison.tex").read_text()


def test_a_model_equals_itself_and_other_data_are_refused(place, copy, tmp_path, caplog):
    with caplog.at_level("INFO"):
        table("--compare", place / "trial", copy)
    differences = re.findall(r"\| ([+-][\d.]+)(?: \[(\S+), (\S+)\])? \|$", caplog.text, flags=re.MULTILINE)
    assert len(differences) > 50 and {value for row in differences for value in row if value} == {"+0.0"}
    path = copy / "papers-table" / "evaluations" / "refcoco-unc-val.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data_checksum": "other"}))
    with pytest.raises(ValueError, match="on refcoco-unc-val are about other data"):
        table("--compare", place / "trial", copy)
    with pytest.raises(FileNotFoundError, match="holds no table"):
        table("--compare", place / "trial", tmp_path)


# Input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give a MODEL, or --compare A B, or --predictions DIR"),
        (["trial"], "--root is missing"),
        (["trial", "--root", "refer", "--threshold", "2"], "--threshold"),
        (["trial", "--root", "refer", "--threshold", "0.4", "--expected_iou"], "leave out --threshold"),
        (["trial", "--root", "refer", "--batch_size", "0"], "'0' is no whole number"),
        (["trial", "--compare", "a", "b"], "give a MODEL, or"),
    ],
)
def test_wrong_options_are_named_in_one_line(options, said, capsys):
    with pytest.raises(SystemExit) as error:
        papers_table.main(options)
    assert error.value.code == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_split_or_set_that_is_not_there_is_named(place, tmp_path):
    with pytest.raises(
        ValueError, match=r"--only refcoco-unc-test: there is no such split .* there are refcoco-unc-val, "
    ):
        table(place / "trial", "--root", place / "refer", "--only", "refcoco-unc-test")
    with pytest.raises(FileNotFoundError, match="There is no split of RefCOCO"):
        table(place / "trial", "--root", tmp_path)
    with pytest.raises(ValueError, match="--predictions needs --only"):
        table("--predictions", tmp_path, "--root", place / "refer")


def test_the_help_fits_a_screen(capsys):
    with pytest.raises(SystemExit):
        papers_table.main(["--help"])
    assert len(capsys.readouterr().out.splitlines()) <= 50


def test_the_metrics_follow_from_the_scores(place):
    for record in records_in(place / "trial" / "papers-table").values():
        assert record["summary"]["as written"] == summarize([SentenceScore(**score) for score in record["scores"]])
