"""IMCNet as a library: network, weights files and the streaming segmenter.

Import from the modules themselves, as in ``from model.segmenter import Segmenter``. This file imports
nothing, so that the modules which need no torch (``model.windows``) stay free of it.
"""
