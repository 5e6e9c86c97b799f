// The only place that knows OpenMP.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace slimkern {

// f(task, worker) for every task in [0, tasks), on at most `threads` workers; worker < threads.
// Tasks are dealt out as workers become free: their cost is uneven at the edges. f must not throw.
template <class F>
void parallel_for(int64_t tasks, int threads, const F& f) {
#if defined(_OPENMP)
  if (threads > 1 && tasks > 1) {
    const int workers = static_cast<int>(tasks < threads ? tasks : threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(workers)
    for (int64_t task = 0; task < tasks; ++task) f(task, omp_get_thread_num());
    return;
  }
#endif
  for (int64_t task = 0; task < tasks; ++task) f(task, 0);
}

}  // namespace slimkern
