"""Fine-tuning of a trained stage: LoRA adapters, DreamBooth."""
