"The command, for `python -m deepcluster_nb` and for launchers such as torchrun."
import sys
from .experiments import main

sys.exit(main())
