"""behrt_jax: BERT-style encoders on electronic health records, pretrained and adapted in JAX."""

__version__ = "0.1.0"
