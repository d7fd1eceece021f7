from setuptools import setup

setup(
    cffi_modules=["vhostpc/_native/build.py:ffibuilder"],
    # The module keeps to the stable ABI, so one wheel serves every Python from 3.11 on.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
