"""From a checkpoint on disk to packed experts in memory."""
