from .pipeline_imagen_cascade import ImagenCascadePipeline
from .pipeline_output import ImagenPipelineOutput


__all__ = ["ImagenCascadePipeline", "ImagenPipelineOutput"]
