"""Weight-only and mixed-precision quantization, SVDQuant, QuEST, a shared base."""
