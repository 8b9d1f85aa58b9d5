"""The demonstration: a real small MoE, made here from a packaged language model, then fine-tuned by LLaMA-Factory."""
