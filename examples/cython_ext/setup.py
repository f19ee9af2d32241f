from Cython.Build import cythonize
from setuptools import Extension, setup

import s2shadow

setup(ext_modules=cythonize(Extension("toy_mmu", ["toy_mmu.pyx"], include_dirs=[s2shadow.get_include()])))
