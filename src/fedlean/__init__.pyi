from fedlean import method as method
from fedlean.api.compare import Comparison as Comparison
from fedlean.api.compare import compare as compare
from fedlean.api.model import Model as Model
from fedlean.api.model import load as load
from fedlean.api.planning import Device as Device
from fedlean.api.planning import Plan as Plan
from fedlean.api.planning import plan as plan
from fedlean.api.run import Run as Run
from fedlean.api.train import resume as resume
from fedlean.api.train import train as train
from fedlean.data.dataset import Dataset as Dataset
from fedlean.fleet.fleet import Fleet as Fleet
from fedlean.spec import ModelSpec as ModelSpec

__version__: str
