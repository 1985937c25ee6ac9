"""Packed checkpoints in Transformers.

    import matquant
    model = AutoModelForCausalLM.from_pretrained(folder, bits=3)     # or {layer: bits}, or the file of an allocation
    model = AutoModelForCausalLM.from_pretrained(folder, max_bits=4) # reads and keeps only the planes of 4 bits
    model = AutoModelForCausalLM.from_pretrained(folder, bits=2, prefill_bits=8)
    model.set_bits(4)                                                # at any time; no data is moved or loaded
    model.save_pretrained(other)

``bits``, ``prefill_bits`` and ``max_bits`` are entries of the checkpoint's config, so ``from_pretrained`` accepts them.
A folder in the published MatGPTQ format (``quant_method: matgptq_quant``) has no such entries: set them on the config
(``config.bits = 3``) and pass it as ``config=``, or call ``set_bits``. ``save_pretrained`` writes it as a nested checkpoint.
"""


def register() -> None:
    """Register the quantization methods ``matquant`` and ``matgptq_quant`` with Transformers. Idempotent."""
    from transformers.quantizers import auto

    from matquant.transformers.quantizer import HfMatGptqConfig, HfNestedConfig, NestedQuantizer

    for config in (HfNestedConfig, HfMatGptqConfig):
        if config.quant_method not in auto.AUTO_QUANTIZER_MAPPING:
            auto.register_quantization_config(config.quant_method)(config)
            auto.register_quantizer(config.quant_method)(NestedQuantizer)
