"""A process of a host alone: the start of a program for ``python -c``.

The plugin cannot be imported there, and mmcv has no compiled operators.
"""

BLOCKED = """
import importlib.abc, importlib.machinery, sys
class Blocker(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'lors_plugin':
            raise ImportError('blocked: ' + name)
        if name == 'mmcv._ext':
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        module.__getattr__ = operator
def operator(name):
    if name.startswith('__'):
        raise AttributeError(name)
    return lambda *args: None
sys.meta_path.insert(0, Blocker())
"""
