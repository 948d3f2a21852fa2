"""A text tower made of a sentence encoder: alignment of tokens, phrases, and a whole run on a random teacher."""

from pathlib import Path

import pytest
import torch
from builders import Folder, tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn.functional import cosine_similarity
from transformers import BertConfig, BertModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedTokenizerFast

from modeling_sera import SeraForReferringSegmentation
from training.configuration import DataSettings
from training.distil_text import DistillationSettings, Phrases, Teacher, aligned, distil, frequent_words

WORDS = ["left", "right", "zebra", "cup", "the", "striped", "one", "0", "4"]


def save_teacher(folder: Path) -> Path:
    """A random BERT of four attention heads whose words are whole."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder)
    return folder


def test_features_are_averaged_by_shared_characters():
    features = torch.tensor([[[1.0], [3.0], [100.0]]])
    spans = torch.tensor([[[0, 4], [4, 6], [0, 6]]])  # "left" "er", and padding that would cover all
    mask = torch.tensor([[1, 1, 0]])
    onto = torch.tensor([[[0, 0], [0, 6], [2, 4], [4, 5]]])
    targets, counted = aligned(features, spans, mask, onto)
    assert counted.tolist() == [[False, True, True, True]]
    assert targets[0, 1:, 0].tolist() == pytest.approx([(4 * 1 + 2 * 3) / 6, 1.0, 3.0])


def test_phrases_hold_words_of_the_sentences_and_the_vocabulary_alone():
    tokenizer = tiny_tokenizer()
    assert set(frequent_words(tokenizer)) == {"left", "right", "zebra", "cup", "the"}
    sentences = ["Striped ONE here", "the cup"]
    drawn = Phrases(sentences, tokenizer, seed=0).draw(64)
    known = {"striped", "one", "here", "the", "cup", *frequent_words(tokenizer)}
    assert len(drawn) == 64 and {word for phrase in drawn for word in phrase.split()} <= known
    assert drawn == Phrases(sentences, tokenizer, seed=0).draw(64) != Phrases(sentences, tokenizer, seed=1).draw(64)


def settings_of(folder: Path, **changes) -> DistillationSettings:
    """A small REFER set, teacher and tokenizer in a folder, and a short distillation of them."""
    Folder(folder / "refer").write()
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    save_teacher(folder / "teacher")
    return DistillationSettings(
        **{
            "teacher": str(folder / "teacher"),
            "tokenizer": str(folder / "tokenizer"),
            "output": str(folder / "text"),
            "data": DataSettings(root=str(folder / "refer")),
            "layers": 1,
            "heads": 2,
            "intermediate_size": 64,
            "batch_size": 16,
            "learning_rate": 5e-3,
        }
        | changes
    )


@pytest.mark.parametrize("option", ["teacher", "tokenizer"])
def test_a_folder_that_is_not_there_is_named(option, tmp_path):
    settings = settings_of(tmp_path, **{option: str(tmp_path / "nowhere")})
    with pytest.raises(FileNotFoundError, match=f"^{option}: There is no folder {tmp_path / 'nowhere'}"):
        distil(settings)


def test_a_tower_that_is_not_finite_is_not_saved(tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"at step 3, and nothing is saved. Lower learning_rate \(it is 1e\+30\)"
    ):
        distil(settings_of(tmp_path, learning_rate=1e30, steps=3))
    assert not (tmp_path / "text").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    settings = settings_of(tmp_path, output=str(tmp_path / "refer"))
    with pytest.raises(ValueError, match="refer holds something else than a text tower"):
        distil(settings)
    assert list((tmp_path / "refer").iterdir())


def test_a_tower_learns_the_teachers_sentence_features_and_is_loaded_as_any_text_tower(tmp_path):
    settings = settings_of(tmp_path)
    teacher = Teacher(settings.teacher)
    texts = ["the zebra 0", "striped one 4", "left cup", "right zebra"]
    reached = []
    for steps in (1, 80):
        distil(DistillationSettings(**(vars(settings) | {"steps": steps})))
        student = CLIPTextModelWithProjection.from_pretrained(tmp_path / "text").eval()
        tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "text")
        with torch.no_grad():
            features = student(**tokenizer(texts, padding=True, return_tensors="pt")).text_embeds
        wanted = teacher(texts)[3]
        reached.append(cosine_similarity(features, wanted).mean().item())
    assert reached[0] < 0.6 and reached[1] > 0.8
    numbers = [tokenizer.get_vocab()[token] for token in ("zebra</w>", "cup</w>")]
    zebra, cup = student.get_input_embeddings().weight[numbers]
    wanted = teacher(["zebra", "cup"])[3]
    assert torch.allclose(zebra - cup, wanted[0] - wanted[1], atol=1e-4)  # both centred alike

    vision = {
        "model_type": "dinov2",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 14,
    }
    model = SeraForReferringSegmentation.from_vision_text_pretrained(
        None, tmp_path / "text", vision_config=vision | {"image_size": 56}
    )
    assert torch.equal(model.model.text_projection.weight, student.text_projection.weight)
