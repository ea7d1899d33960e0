#include "core/op_test.h"

using op_test::Dims;

PF_CASES(copy) {
  for (int64_t n : {1, 100, 70001}) {
    test.Case("fill").Out({n}).Scalars({-1.5}).Tolerance(0, 0).Run();
    test.Case("fill").OutInt({n}).Scalars({7}).Tolerance(0, 0).Run();
    test.Case("fill").OutU8({n}).Scalars({300}).Tolerance(0, 0).Run();
  }

  struct {
    double outer, count, inner, xa, xo, ya, yo;
  } regions[] = {{1, 1, 1, 1, 0, 1, 0},   {2, 3, 5, 4, 1, 7, 2}, {3, 2, 4000, 2, 0, 5, 3},
                 {500, 1, 3, 1, 0, 3, 2}, {1, 0, 4, 2, 1, 2, 2}, {1, 90000, 1, 90001, 1, 90000, 0}};
  for (auto& r : regions) {
    const Dims x{int64_t(r.outer), int64_t(r.xa), int64_t(r.inner)},
        y{int64_t(r.outer), int64_t(r.ya), int64_t(r.inner)};
    for (double accumulate : {0, 1}) {
      const std::vector<double> s{r.outer, r.count, r.inner, r.xa, r.xo, r.ya, r.yo, accumulate};
      test.Case("copy_region").In(x).InOut(y).Scalars(s).Tolerance(1e-7, 4e-3).Run();
      test.Case("copy_region").InF32(x).InOut(y).Scalars(s).Tolerance(1e-7, 4e-3).Run();
      test.Case("copy_region").In(x).InOutF32(y).Scalars(s).Tolerance(1e-7, 1e-7).Run();
    }
  }
  test.Case("copy_region")
      .InInt({2, 3}, [](int64_t i) { return i * 1000; })
      .OutInt({2, 3})
      .Scalars({2, 3, 1, 3, 0, 3, 0, 0})
      .Tolerance(0, 0)
      .Run();
  test.Case("copy_region").In({4}).InOut({4}).Scalars({1, 3, 1, 4, 2, 4, 0, 0}).RunExpecting(PF_ERR_SHAPE);

  struct {
    Dims x;
    std::vector<int> p;
  } orders[] = {{{7}, {0}},
                {{3, 5}, {1, 0}},
                {{3, 5}, {0, 1}},
                {{64, 100}, {1, 0}},
                {{2, 16, 3, 10, 14}, {0, 2, 3, 4, 1}},
                {{2, 3, 10, 14, 16}, {0, 4, 1, 2, 3}},
                {{3, 4, 5, 24, 2, 2}, {0, 1, 4, 2, 5, 3}},
                {{3, 4, 5, 3, 2, 2}, {0, 1, 4, 2, 5, 3}},
                {{3, 4, 2, 5, 2, 24}, {0, 1, 3, 5, 2, 4}},
                {{4, 6, 8}, {1, 0, 2}},
                {{2, 3, 4, 5}, {3, 2, 1, 0}},
                {{2, 3, 4, 5, 6, 7}, {5, 3, 1, 4, 2, 0}},
                {{1, 3, 1, 9}, {3, 2, 0, 1}},
                {{2, 3, 4, 64, 64}, {0, 2, 3, 4, 1}},
                {{2, 130, 8, 9}, {0, 2, 3, 1}},
                {{30, 40, 3}, {1, 0, 2}},
                {{200, 300}, {1, 0}},
                {{4, 2000, 2}, {0, 2, 1}}};
  for (auto& o : orders) {
    Dims y;
    std::vector<double> s;
    for (size_t j = 0; j < 6; ++j) s.push_back(j < o.p.size() ? o.p[j] : 0);
    for (int p : o.p) y.push_back(o.x[p]);
    test.Case("permute").In(o.x).Out(y).Scalars(s).Tolerance(1e-7, 1e-7).Run();
    test.Case("permute").InInt(o.x, [](int64_t i) { return i; }).OutInt(y).Scalars(s).Tolerance(0, 0).Run();
    test.Case("permute")
        .InU8(o.x, [](int64_t i) { return i % 251; })
        .OutU8(y)
        .Scalars(s)
        .Tolerance(0, 0)
        .Run();
  }
  test.Case("permute").In({2, 3}).Out({2, 3}).Scalars({1, 0, 0, 0, 0, 0}).RunExpecting(PF_ERR_SHAPE);
}
