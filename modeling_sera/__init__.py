"""SERA: Spatio-Semantic Expert Routing Architecture for referring image segmentation (arXiv 2603.12538)."""

from transformers import AutoConfig, AutoModel

from .configuration_sera import SeraConfig
from .modeling_sera import SeraForReferringSegmentation, SeraModel

AutoConfig.register(SeraConfig.model_type, SeraConfig)
AutoModel.register(SeraConfig, SeraForReferringSegmentation)
# A saved model brings its code along, for machines without this package.
SeraConfig.register_for_auto_class()
SeraForReferringSegmentation.register_for_auto_class()

__all__ = ["SeraConfig", "SeraForReferringSegmentation", "SeraModel"]
