"""FlashEVA in other libraries: transformers' loading and Trainer, accelerate."""
