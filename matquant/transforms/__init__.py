"""Invertible transforms of a checkpoint's weights, applied where weights are materialized.

A transform is a subclass of ``WeightTransform`` in a module of its own, with a subclass of ``TransformConfig`` that
builds it, one entry in ``registry.TRANSFORMS``, and one YAML file in ``conf/transform``.
"""
