"""Pipelines: from a prompt to images. Start reading here."""

from typing import TYPE_CHECKING

from ..utils.imports import lazy_names


if TYPE_CHECKING:
    from .pipeline_imagen import ImagenPipeline
    from .pipeline_imagen_cascade import ImagenCascadePipeline
    from .pipeline_imagen_superresolution import ImagenSuperResolutionPipeline
    from .pipeline_output import ImagenPipelineOutput

__all__ = ["ImagenCascadePipeline", "ImagenPipeline", "ImagenPipelineOutput", "ImagenSuperResolutionPipeline"]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        ".pipeline_imagen": ("ImagenPipeline",),
        ".pipeline_imagen_cascade": ("ImagenCascadePipeline",),
        ".pipeline_imagen_superresolution": ("ImagenSuperResolutionPipeline",),
        ".pipeline_output": ("ImagenPipelineOutput",),
    },
)
