"""The studies, a module each; :func:`robustdyn.analysis.study.names` lists them."""
