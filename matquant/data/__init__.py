"""Texts that models are calibrated and measured on, and the token windows cut from them."""
