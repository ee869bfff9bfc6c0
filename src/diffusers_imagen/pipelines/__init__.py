"""From a prompt to a picture. READ FIRST."""

from .pipeline_imagen import ImagenPipeline
from .pipeline_imagen_cascade import ImagenCascadePipeline
from .pipeline_imagen_superresolution import ImagenSuperResolutionPipeline
from .pipeline_output import ImagenPipelineOutput


__all__ = ["ImagenCascadePipeline", "ImagenPipeline", "ImagenPipelineOutput", "ImagenSuperResolutionPipeline"]
