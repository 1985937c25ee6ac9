"""Stages of a job as functions: load, quantize, search, evaluate, pack, generate.

config -> load_job -> LoadedJob -> quantize -> QuantizedJob -> search -> SliceSpec ... -> evaluate -> JobResults
                                                                                  -> pack, generate
"""
