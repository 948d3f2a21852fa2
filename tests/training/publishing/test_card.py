"""The model card holds the figures of its run and its evaluations and no others, and can be parsed again."""

import ast
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from evaluations import SCENES, write_evaluation
from huggingface_hub import ModelCard

from training.configuration import (
    DataSettings,
    MixedSet,
    ModelSettings,
    OptimizationSettings,
    TrainingSettings,
    dump_settings,
    load_settings,
)
from training.publishing.card import NO_RESULTS, check_card, model_card, read_evaluation, read_run
from training.scoring.reports import model_index
from training.support.files import write_text

REFCOCOG = {by: DataSettings(source="refer", root="refer", dataset="refcocog", split_by=by) for by in ("umd", "google")}
CODE = "```python"


ROUTERS = {
    "taps": {
        "4": {"deviation": 0.123, "mutual_information": 0.045, "shares": {"spatial": 0.531, "shape": 0.469}}
        | {"added": {"spatial": 0.034, "shape": 0.8}, "samples": 40, "logit_deviation": 0.6, "dead_units": 0.0}
    },
    "adapters": {
        "3": {"deviation": 0.2, "mutual_information": 0.31, "shares": {"spatial": 0.4, "boundary": 0.6}}
        | {"added": {"spatial": 0.2, "boundary": 0.2}, "samples": 40, "logit_deviation": 0.9}
    },
}


def write_run(folder: Path, **settings) -> Path:
    """Write a run's folder like training, without weights; returns its model's folder."""
    settings = {"data": SCENES, "optimization": OptimizationSettings(epochs=3, learning_rate=2e-4)} | settings
    write_text(folder / "settings.yaml", dump_settings(TrainingSettings(**settings)))
    tuning = {"vision_trained": 1234, "vision_total": 56789, "text_trained": 4321, "text_total": 98765, "added": 1357}
    write_text(folder / "tuning.json", json.dumps(tuning))
    history = [{"epoch": i, "val": {"mIoU": value}} for i, value in ((1, 0.123), (3, 0.4567), (4, 0.3))]
    history[1]["routing"] = ROUTERS
    history.insert(1, {"epoch": 2})
    write_text(folder / "history.json", json.dumps(history))
    write_text(folder / "model" / "config.json", "{}")
    return folder / "model"


def make_card(
    evaluations=(),
    model_folder: Path | None = None,
    examples=(),
    chosen: bool = False,
    predicts_presence: bool = False,
    towers: tuple[str, str] = ("DINOv2", "CLIP"),
) -> str:
    run = None if model_folder is None else read_run(model_folder)
    return model_card(
        "someone/zebra-finder",
        run=run,
        evaluations=list(evaluations),
        examples=list(examples),
        chosen=chosen,
        predicts_presence=predicts_presence,
        towers=towers,
    )


def test_the_card_names_the_kinds_of_towers():
    card = make_card(towers=("DINOv3", "SigLIP"))
    assert {"dinov3", "siglip"} <= set(front_matter(card)["tags"]) and "dinov2" not in card.lower()
    assert "A DINOv3 vision tower" in card and "a SigLIP text tower" in card and "CLIP's" not in card


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def section(card: str, title: str) -> str:
    return re.split(r"^## ", card.split(f"\n## {title}\n", 1)[1], flags=re.MULTILINE)[0]


def decimals(text: str) -> set[str]:
    return set(re.findall(r"\d+\.\d+", text))


def leaves(value) -> list:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in [key, *leaves(item)]]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else [value]


@pytest.fixture
def record(tmp_path) -> dict:
    return read_evaluation(write_evaluation(tmp_path / "evaluation-test.json"), {"trial"})


def test_the_metrics_are_those_of_the_evaluation(record, tmp_path):
    card = make_card([record])
    check_card(card, tmp_path)
    (entry,) = front_matter(card)["model-index"]
    (result,) = entry["results"]
    assert entry["name"] == "zebra-finder" and result["task"]["type"] == "image-segmentation"
    assert result["dataset"]["split"] == "test" and result["dataset"]["args"] == record["counts"]
    metrics = dict(record["summary"]["as written"]["all"])
    metrics.pop("num_expressions")
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {
        name: pytest.approx(100 * value, abs=0.005) for name, value in metrics.items()
    }
    assert all(metric["args"]["threshold"] == 0.35 for metric in result["metrics"])
    assert f"| {100 * metrics['mIoU']:.1f} [" in section(card, "Results")
    assert record["command"] in card and record["hardware"]["processor"] in card


def test_every_figure_on_the_card_comes_from_a_file(record, tmp_path):
    card = make_card([record], write_run(tmp_path / "trial"))
    known = set()
    sources = [
        record,
        *(json.loads((tmp_path / "trial" / name).read_text()) for name in ("history.json", "tuning.json")),
    ]
    sources.append(yaml.safe_load((tmp_path / "trial" / "settings.yaml").read_text()))
    for leaf in leaves(sources):
        if isinstance(leaf, float):
            known |= {f"{100 * leaf:.1f}", f"{leaf:g}", str(round(100 * leaf, 2)), f"{leaf:.2f}", f"{leaf:.3f}"}
        known |= decimals(str(leaf))
    shown = decimals(card.split(CODE)[0]) | decimals(section(card, "Training")) | decimals(section(card, "Results"))
    shown -= {"2603.12538"}  # the paper's number on arXiv
    assert len(shown) > 20 and shown <= known


def test_the_card_says_how_the_kept_model_routes_and_what_is_idle(tmp_path):
    training = section(make_card(model_folder=write_run(tmp_path / "trial")), "Training")
    assert "tap 4 12.3 % (0.04), adapter 3 20.0 % (0.31)" in training
    assert "The router of tap 4 has 1 idle expert: spatial (adds 3.4 % of the map's norm)." in training
    assert "The router of adapter 3" not in training
    (tmp_path / "trial" / "history.json").write_text(json.dumps([{"epoch": 1, "val": {"mIoU": 0.5}}]))
    assert "Routing" not in section(make_card(model_folder=tmp_path / "trial" / "model"), "Training")


def test_without_an_evaluation_the_card_says_so_and_has_no_figures(tmp_path):
    card = make_card()
    check_card(card, tmp_path)
    assert section(card, "Results").strip() == NO_RESULTS
    assert "model-index" not in front_matter(card)
    assert decimals(card) == {"2.0", "2603.12538"}  # from the licence and the paper
    assert "no record" in section(card, "Training")


def test_the_card_has_the_metadata_that_the_hub_needs():
    metadata = front_matter(make_card())
    assert metadata["pipeline_tag"] == "image-segmentation" and metadata["library_name"] == "transformers"
    assert metadata["license"] == "apache-2.0" and metadata["language"] == "en"
    assert "someone/zebra-finder" in make_card() and "{{" not in make_card() and "{%" not in make_card()


def test_the_training_section_comes_from_the_run(tmp_path):
    training = section(make_card([], write_run(tmp_path / "trial")), "Training")
    for account in ("1,234 of 56,789", "4,321 of 98,765", "1,357", "norm_bias", "3 epochs", "0.0002", "64 pixels"):
        assert account in training
    assert "epoch 3 of 4" in training and "45.7 %" in training and "of 3 evaluated" in training
    assert "random weights" in training


def test_the_settings_on_the_card_are_those_of_the_run(tmp_path):
    model = ModelSettings(vision_model=str(tmp_path / "towers" / "dinov2"), config={"adapter_layers": [1]})
    folder = write_run(tmp_path / "trial", model=model)
    training = section(make_card([], folder), "Training")
    (tmp_path / "again.yaml").write_text(training.split("```yaml\n")[1].split("```")[0])
    expected = read_run(folder).settings
    expected = replace(expected, model=replace(expected.model, vision_model="dinov2"))  # without the machine's folders
    assert load_settings(tmp_path / "again.yaml") == expected
    assert str(tmp_path) not in training


def test_limits_are_those_of_the_model(tmp_path):
    scenes = write_run(tmp_path / "scenes")
    photographs = write_run(tmp_path / "photographs", data=REFCOCOG["umd"])
    assert "does not know photographs" in make_card([], scenes)
    onward = make_card([], write_run(tmp_path / "onward", model=ModelSettings(pretrained=str(tmp_path / "first"))))
    assert (
        "last trained only on drawn scenes" in onward
        and "started from `first`, a model that is not published" in onward
    )
    published = make_card([], write_run(tmp_path / "further", model=ModelSettings(pretrained="someone/sera-base")))
    assert "started from [someone/sera-base](https://huggingface.co/someone/sera-base)" in published
    assert "identify or judge people" in make_card([], photographs) and "identify or judge people" in make_card()
    assert "still gets a mask" in make_card() and "still gets a mask" not in make_card(predicts_presence=True)


def test_towers_and_data_are_named_by_their_ids_and_folders_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "towers" / "clip").mkdir(parents=True)
    (tmp_path / "prepared" / "refcoco").mkdir(parents=True)
    towers = ModelSettings(vision_model="facebook/dinov2-with-registers-base", text_model="towers/clip")
    further = [MixedSet(source="folder", root=root) for root in ("lmms-lab/RefCOCO", str(tmp_path / "other"))]
    data = DataSettings(source="folder", root="prepared/refcoco", mix=further)
    run = write_run(tmp_path / "outputs" / "trial", model=towers, data=data)
    monkeypatch.chdir("/")  # the folders are found from the run too
    card = make_card([], run)
    metadata = front_matter(card)
    assert metadata["base_model"] == ["facebook/dinov2-with-registers-base"] and metadata["datasets"] == [
        "lmms-lab/RefCOCO"
    ]
    assert metadata["base_model_relation"] == "finetune"
    assert "base_model_relation" not in front_matter(make_card([], write_run(tmp_path / "outputs" / "fresh")))
    assert str(tmp_path) not in card
    further = [
        MixedSet(dataset="refcoco+", weight=1),
        MixedSet(root=str(tmp_path / "g"), dataset="refcocog", weight=0.5),
    ]
    refer = DataSettings(source="refer", root=str(tmp_path), dataset="refcoco", weight=2, mix=further)
    whole = ModelSettings(pretrained="someone/sera-base", vision_model="facebook/dinov2-base")
    card = make_card([], write_run(tmp_path / "second", model=whole, data=refer))
    assert "RefCOCO (unc), weight 2, RefCOCO+ (unc), weight 1, RefCOCOg (unc) in g, weight 0.5" in card
    metadata = front_matter(card)
    assert metadata["datasets"] == ["refcoco", "refcoco+", "refcocog"] and metadata["base_model"] == [
        "someone/sera-base"
    ]
    local = ModelSettings(pretrained="outputs/first", vision_model="facebook/dinov2-base")  # a run, gone by now
    assert "base_model" not in front_matter(make_card([], write_run(tmp_path / "onward", model=local)))
    metadata = front_matter(make_card([], write_run(tmp_path / "third")))
    assert "datasets" not in metadata and "base_model" not in metadata


def test_splits_of_the_same_name_are_told_apart(tmp_path):
    records = [
        read_evaluation(write_evaluation(tmp_path / f"{by}.json", data, "val", shift=i), {"trial"})
        for i, (by, data) in enumerate(REFCOCOG.items())
    ]
    card = make_card(records)
    check_card(card, tmp_path)
    results = ModelCard(card).data.eval_results
    for by, record in zip(REFCOCOG, records, strict=True):
        (value,) = (r.metric_value for r in results if r.metric_type == "mIoU" and r.dataset_config == by)
        assert value == pytest.approx(100 * record["summary"]["as written"]["all"]["mIoU"], abs=0.005)
        (result,) = yaml.safe_load(model_index(record))["model-index"][0]["results"]
        assert result["dataset"]["config"] == by and result["dataset"]["type"] == "refcocog"
    assert len(front_matter(card)["model-index"][0]["results"]) == 2
    assert len(re.findall("^### ", card, flags=re.MULTILINE)) == 2
    with pytest.raises(ValueError, match=r"Two of the evaluations are of a part of RefCOCOg \(umd\), split val"):
        make_card([records[0], records[0]])


def test_examples_with_any_words_are_in_the_gallery(tmp_path):
    texts = ['it\'s: "left" {{ 7 * 7 }} # é — 猫', "left zebra", "- yes", "{% raw %}"]
    examples = [(text, f"examples/{i}.png") for i, text in enumerate(texts)]
    card = make_card(examples=examples)
    shown = [(widget["text"], widget["output"]["url"]) for widget in front_matter(card)["widget"]]
    assert shown == examples and "<Gallery />" in card and "<Gallery />" not in make_card()
    call = (
        ast.parse(card.split(CODE)[1].split("```")[0]).body[-1].value
    )  # image and expression are those of the first example
    image, asked = map(ast.literal_eval, call.args)
    assert (
        image == "https://huggingface.co/someone/zebra-finder/resolve/main/examples/0-image.png" and asked == texts[:1]
    )
    assert "not chosen by their results" in card and "publisher of the model chose" in make_card(
        examples=examples, chosen=True
    )
    with pytest.raises(ValueError, match=r"examples/0\.png, which is not sent"):
        check_card(card, tmp_path)
    for _, path in examples:
        write_text(tmp_path / path, "")
    check_card(card, tmp_path)


def test_a_card_with_a_broken_model_index_is_refused(record, tmp_path):
    card = make_card([record])
    with pytest.raises(ValueError):
        check_card(card.replace("      type: image-segmentation\n", "", 1), tmp_path)
    with pytest.raises(ValueError, match="written and parsed again"):
        check_card(card.replace("license: apache-2.0", "license: apache-2.0\nmodel_name: other"), tmp_path)


def test_evaluations_of_another_model_and_changed_ones_are_refused(tmp_path):
    path = write_evaluation(tmp_path / "evaluation-test.json")
    record = json.loads(path.read_text())
    with pytest.raises(ValueError, match="an evaluation of 'trial', not of another"):
        read_evaluation(path, {"another"})

    record["summary"]["as written"]["all"]["mIoU"] += 0.01
    write_text(path, json.dumps(record))
    with pytest.raises(ValueError, match="its figures do not follow from its scores"):
        read_evaluation(path, {"trial"})

    for content in ("{", "[]", "7", '{"model": "trial"}', json.dumps(record | {"scores": [{"row": 1}]})):
        write_text(path, content)
        with pytest.raises(ValueError, match=re.escape(str(path))) as error:
            read_evaluation(path, {"trial"})
        assert "\n" not in str(error.value)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="is not JSON"):
        read_evaluation(path, {"trial"})
    with pytest.raises(FileNotFoundError):
        read_evaluation(tmp_path / "none.json", {"trial"})


def test_a_model_without_a_run_has_no_training_section(tmp_path):
    write_run(tmp_path / "trial")
    write_text(tmp_path / "trial" / "copy" / "config.json", "{}")
    assert read_run(tmp_path / "trial" / "copy") is None
    assert read_run(tmp_path / "trial" / "model").settings.data == SCENES
    assert read_run(tmp_path / "trial").settings.data == SCENES
