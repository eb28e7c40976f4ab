"""The Python API: a loaded model, tables and series in pandas, estimators for scikit-learn."""
