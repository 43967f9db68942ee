"""Names that OpenRLHF imports at its start and uses for packed or ring attention alone.

flash-attn itself is built with a CUDA compiler.
"""
