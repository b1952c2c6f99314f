"""Numbers -> tables, sentences, figures, report.json, model card."""
