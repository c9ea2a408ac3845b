"""Models of one's own for SGLang: SGLANG_EXTERNAL_MODEL_PACKAGE=sglang_models."""
