# no Python names: for cimport inside the package
