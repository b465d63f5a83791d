"""What writers of methods need, in one place: `import fedlean as fl`, then `fl.method`.

docs/adding-a-method.md shows how they are used.
"""

from fedlean.algorithm import Device as Device
from fedlean.algorithm import FederatedAlgorithm as FederatedAlgorithm
from fedlean.algorithm import Server as Server
from fedlean.core import ClientTask as ClientTask
from fedlean.core import ClientUpdate as ClientUpdate
from fedlean.core import Model as Model
from fedlean.core import Statistic as Statistic
from fedlean.core import StatisticForm as StatisticForm
from fedlean.core import SubModel as SubModel
from fedlean.core import Work as Work
from fedlean.core import derive_seed as derive_seed
from fedlean.core import generator as generator
from fedlean.engine.protocol import SGD as SGD
from fedlean.train.cohort import cohort_tasks as cohort_tasks
from fedlean.train.local_sgd import LocalSGD as LocalSGD
from fedlean.train.local_sgd import loss_of as loss_of
from fedlean.train.local_sgd import with_local_sgd as with_local_sgd
from fedlean.train.sgd import local_sgd as local_sgd
from fedlean.train.work import sgd_work as sgd_work
from fedlean.tree import apply_mask as apply_mask
from fedlean.tree import fold as fold
from fedlean.tree import read_only as read_only
