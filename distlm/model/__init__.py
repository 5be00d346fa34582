"""The Transformer: found, built from a preset, a configuration or a checkpoint; its loss; its export."""
