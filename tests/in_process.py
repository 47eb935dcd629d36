("An experiment's notebook without a kernel, whose process takes seconds to start. "
 "train and probe are tested with theirs; what the others compute and leave does not depend on it.")
import sys
import nbformat
from IPython.core.interactiveshell import InteractiveShell
from execnb.shell import CaptureShell
from papermill.exceptions import PapermillExecutionError
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from deepcluster_nb.runs import Hold

def execute(notebook, page, given): # as experiments.execute does
    before = sys.modules['__main__'], InteractiveShell._instance
    nb = parameterize_notebook(load_notebook_node(str(notebook)), given, True, kernel_name='python3',
                               language='python')
    shell = CaptureShell(mpl_format='png')
    try:
        for i,c in enumerate(nb.cells):
            if c.cell_type != 'code': continue
            c.outputs = [nbformat.from_dict(o) for o in shell.run(c.source)]
            for o in c.outputs:
                if o.output_type == 'stream': print(''.join(o.text), end='')
            if e := shell.exc:
                raise PapermillExecutionError(i, None, c.source, type(e).__name__, str(e), [])
    finally:
        for v in shell.user_ns.values():
            if isinstance(v, Hold): v.let_go()               # as the end of its process would
        sys.modules['__main__'], InteractiveShell._instance = before
        page.write_text(nbformat.writes(nb), encoding='utf-8')
