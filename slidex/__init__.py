"""slidex: classifiers with very many classes, computed on the classes that matter."""

__version__ = "0.1.0"
