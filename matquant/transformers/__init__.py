"""Packed checkpoints in Transformers.

    import matquant
    model = AutoModelForCausalLM.from_pretrained(folder, bits=3)     # a width, or {layer: width}, or an allocation's file
    model = AutoModelForCausalLM.from_pretrained(folder, max_bits=4) # reads and keeps the planes of 4 bits, and no more
    model = AutoModelForCausalLM.from_pretrained(folder, bits=2, prefill_bits=8)
    model.set_bits(4)                                                # at any time; nothing is moved or loaded
    model.save_pretrained(other)

``bits``, ``prefill_bits`` and ``max_bits`` are entries of the checkpoint's config, which ``from_pretrained`` lets its caller
override. A folder in the published MatGPTQ format (``quant_method: matgptq_quant``) has no such entries: set them on the
config (``config.bits = 3``) and give it with ``config=``, or call ``set_bits``. It is saved again as a nested checkpoint.
"""


def register() -> None:
    """Make the quantization methods ``matquant`` and ``matgptq_quant`` known to Transformers; a second call does nothing."""
    from transformers.quantizers import auto

    from matquant.transformers.quantizer import MatGptqConfig, NestedConfig, NestedQuantizer

    for config in (NestedConfig, MatGptqConfig):
        if config.quant_method not in auto.AUTO_QUANTIZER_MAPPING:
            auto.register_quantization_config(config.quant_method)(config)
            auto.register_quantizer(config.quant_method)(NestedQuantizer)
