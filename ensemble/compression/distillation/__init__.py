"""Few-step students: SiD, consistency training, MMD fine-tuning."""
