"""Features of images that no text has reached: computed once, they answer any number of expressions. (Ours.)"""

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .configuration_sera import NUM_FUSION_EXPERTS, SeraConfig


@dataclass
class SeraImageFeatures(ModelOutput):
    """
    Output of `get_image_features`: all of B images that the model needs for an expression about them.

    Attributes:
        grid_size: (H, W) of the images, in patches.
        block_states: Of the first adapted block (B, num_prefix + H·W, hidden_size) twice: the hidden states after its attention,
            and its feed-forward part's output. Empty without adapters.
        adapter_maps: (B, adapter_dim, H, W) each: the enriched map of this block's adapter and, where it has experts, theirs.
        fusion_maps: For every tap before that block, its maps (B, fusion_dim, H, W). Of a router that sees the sentence: those of
            all experts. Of another router: their weighted sum. Without experts: the tap's own.
        fusion_means: For every such tap with experts the router's input (B, fusion_dim), the mean of the tap's own map.
    """

    grid_size: tuple[int, int] | None = None
    block_states: tuple[Tensor, ...] | None = None
    adapter_maps: tuple[Tensor, ...] | None = None
    fusion_maps: tuple[tuple[Tensor, ...], ...] | None = None
    fusion_means: tuple[Tensor, ...] | None = None

    @property
    def batch_size(self) -> int:
        """Number of images."""
        return next(tensors_in(self)).shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that the features take."""
        return sum(tensor.nbytes for tensor in tensors_in(self))

    def to(self, *args: Any, **kwargs: Any) -> "SeraImageFeatures":
        """The features on another device or in another dtype, with the arguments of [`torch.Tensor.to`]."""
        return SeraImageFeatures(**{name: _changed(value, args, kwargs) for name, value in self.items()})


def _changed(value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(value, tuple):
        return tuple(_changed(item, args, kwargs) for item in value)
    return value.to(*args, **kwargs) if isinstance(value, Tensor) else value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of features, or of one of their fields, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, ModelOutput)):
        for item in value.values() if isinstance(value, ModelOutput) else value:
            yield from tensors_in(item)


def feature_shapes(config: SeraConfig, batch_size: int, grid_size: tuple[int, int]) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of the tensors in each field of a model's [`SeraImageFeatures`], for `batch_size` images of `grid_size` patches."""
    vision, taps = config.vision_family, list(config.tap_layers)
    tokens = (batch_size, vision.num_prefix + grid_size[0] * grid_size[1], vision.width)
    num_adapted = min(len(config.adapter_layers), 1)
    num_adapter_maps = 3 if config.adapter_experts else 1
    num_taps = sum(depth <= min(config.adapter_layers, default=taps[-1]) for depth in taps)
    routers_see_sentence = config.fusion_experts and config.routers_see_sentence
    num_fusion_maps = NUM_FUSION_EXPERTS if routers_see_sentence else 1
    return {
        "block_states": [tokens] * 2 * num_adapted,
        "adapter_maps": [(batch_size, config.adapter_dim, *grid_size)] * num_adapter_maps * num_adapted,
        "fusion_maps": [(batch_size, config.fusion_dim, *grid_size)] * num_fusion_maps * num_taps,
        "fusion_means": [(batch_size, config.fusion_dim)] * num_taps if config.fusion_experts else [],
    }


def check_features(features: SeraImageFeatures, config: SeraConfig, dtype: torch.dtype) -> None:
    """Refuse features that cannot be of a model.

    Args:
        features: The features.
        config: The model's.
        dtype: Of the model's weights. It is not compared under autocast, where features have several dtypes.

    Raises:
        ValueError: For features of a model of another shape, or in another dtype than the model.
    """
    if not isinstance(features, SeraImageFeatures):
        raise ValueError(
            f"image_features is a {type(features).__name__}; it must be what model.get_image_features(pixel_values) returned."
        )
    if torch.compiler.is_compiling():
        return
    for name, expected in feature_shapes(config, features.batch_size, features.grid_size).items():
        shapes = [tuple(tensor.shape) for tensor in tensors_in(getattr(features, name))]
        if shapes != expected:
            raise ValueError(
                f"image_features are of a model of another shape: their {name} have the shapes {shapes}, this model's have "
                f"{expected}."
            )
    dtypes = {tensor.dtype for tensor in tensors_in(features)}
    if dtype not in dtypes and not torch.is_autocast_enabled(next(tensors_in(features)).device.type):
        raise ValueError(
            f"image_features are of {', '.join(sorted(map(str, dtypes)))}, the model is of {dtype}; cast them with "
            f"image_features.to({dtype})."
        )


class SeraFeatureCache:
    """Keeps what was used last, up to a number of bytes. Any number of threads may use it.

    Args:
        max_bytes: Bytes of all values together.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> Any:
        """The value of a key, which is then the last used one; `None` where it is not kept."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: Hashable, value: Any, num_bytes: int) -> None:
        """Keep a value, unless it alone is larger than the cache. The values that were not used for longest go."""
        if num_bytes > self.max_bytes:
            return
        with self._lock:
            _, before = self._kept.pop(key, (None, 0))
            self._kept[key] = (value, num_bytes)
            self.num_bytes += num_bytes - before
            while self.num_bytes > self.max_bytes:
                _, (_, freed) = self._kept.popitem(last=False)
                self.num_bytes -= freed


__all__ = ["SeraFeatureCache", "SeraImageFeatures", "check_features", "feature_shapes", "tensors_in"]
