"""The Python API: what `import scaling_lab as sl` offers, one module a verb. `scaling_lab/__init__.py` loads them lazily."""
