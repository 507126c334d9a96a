"""The Python API behind `import scaling_lab as sl`, one module for each function; `scaling_lab/__init__.py` loads them lazily."""
