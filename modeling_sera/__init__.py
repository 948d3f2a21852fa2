"""SERA: Spatio-Semantic Expert Routing Architecture for referring image segmentation (arXiv 2603.12538)."""

import transformers

from .configuration_sera import SeraConfig
from .modeling_sera import AUTO_CLASSES, SeraForReferringSegmentation, SeraModel

transformers.AutoConfig.register(SeraConfig.model_type, SeraConfig)
for auto_class in AUTO_CLASSES:
    getattr(transformers, auto_class).register(SeraConfig, SeraForReferringSegmentation)
# A saved model brings its code along, for machines without this package.
SeraConfig.register_for_auto_class()
SeraForReferringSegmentation.register_for_auto_class()

__all__ = ["SeraConfig", "SeraForReferringSegmentation", "SeraModel"]
