"""Processing for SERA: images and expressions to tensors, logits to masks, and the pipeline over both."""

from transformers import AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .collation_sera import SeraDataCollator
from .image_processing_sera import SeraImageProcessor
from .pipeline_sera import ReferringImageSegmentationPipeline
from .processing_sera import SeraProcessor

# A saved folder names its classes, and transformers finds registered classes by name. The key should be the model's
# configuration class. That one lives in the other package, and the lookup by name does not need it. (The image processor's
# registry is imported from its own module: in transformers 5.17 its public name needs torchvision.)
AutoImageProcessor.register(SeraImageProcessor, image_processor_classes={"pil": SeraImageProcessor}, exist_ok=True)
AutoProcessor.register(SeraProcessor, SeraProcessor, exist_ok=True)
# A saved processor brings its code along, for machines without this package.
SeraImageProcessor.register_for_auto_class()
SeraProcessor.register_for_auto_class()

__all__ = ["ReferringImageSegmentationPipeline", "SeraDataCollator", "SeraImageProcessor", "SeraProcessor"]
