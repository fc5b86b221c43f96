"""Comparison of models: rows, tables, paired differences, promotion rule, HTML page."""
