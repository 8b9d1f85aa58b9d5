"""What training a model with kt_sft takes (memory, disk, time), from its config.json alone.

source.find(MODEL) -> config.json, index      model.describe(config) -> ModelParts: what the model consists of
memory, speed: ModelParts + Job + Host -> bytes and seconds, each with its arithmetic      report.make: all of it
"""
