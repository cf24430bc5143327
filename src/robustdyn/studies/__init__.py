"""The studies, a module each; :func:`robustdyn.studies.shared.study.names` lists them."""
